"""The report: its numbers, its files, W&B, resumes, ranks, and that training does not notice it."""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from matplotlib.image import imread

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.comparison import compare_models
from ptl.callbacks.distill_report import DistillReport
from ptl.callbacks.export import Export
from ptl.callbacks.held_rows import held_rows, is_right, last_number, text_of
from ptl.callbacks.jsonl import read_metrics
from ptl.callbacks.record import RunRecord
from ptl.callbacks.saved import latest_checkpoint
from ptl.callbacks.throughput import Throughput
from ptl.data.sources import Source
from ptl.models.spec import ModelSpec
from tests import tiny
from tests.callbacks.distill_parts import (
    ON_RANKS,
    chat,
    distillation,
    let_teacher_know,
    make_folder,
    objective,
    read,
    report,
)
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.callbacks.real import chat as real_chat
from tests.callbacks.real import make_inputs, sft
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("distill"))


def fit(
    run: Path, folder: Path, callbacks: list, *, steps: int = 8, live: bool = True, resume: bool = False, **options
):
    module = distillation(folder) if live else objective(folder, live=False)
    torch.manual_seed(11)
    runner = trainer(run, [RunRecord(run), *callbacks], max_steps=steps, **options)
    runner.fit(module, chat(folder), ckpt_path=latest_checkpoint(run) if resume else None)
    return module


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """One whole run with a baseline, and its module."""
    run = tmp_path_factory.mktemp("run")
    callbacks = [report(folder, baselines={"untrained twin": str(folder / "student")}), Throughput(warmup=1)]
    module = fit(run, folder, callbacks)
    return run, module


def entry(found, name):
    return next(model for model in found["models"] if model["name"] == name)


def test_the_report_is_what_the_models_say(done, folder):
    run, module = done
    found = read(run)
    assert [m["name"] for m in found["models"]] == ["teacher", "before", "after", "untrained twin"]
    assert found["status"] == "finished" and found["step"] == 8 and found["notes"] == []
    data = chat(folder, layout="padded")
    size = len(data.renderer.tokenizer)
    student = ModelSpec(name=str(folder / "student")).build()
    for part, rows in (
        ("special", held_rows(data, None, 512)),
        ("general", held_rows(data, [Source(path=str(folder / "general.jsonl"))], 512)),
    ):
        assert found["rows"][part]["measured"] == len(rows.units) > 5
        for name, model in (("before", student), ("after", module.policy), ("untrained twin", student)):
            seen = compare_models(
                model,
                module.teacher_model(),
                rows.batches(data, 0, 1),
                size,
                sources=len(rows.sources),
            )
            shown = entry(found, name)["parts"][part]
            assert shown["all"]["kl"] == pytest.approx(seen.measures()["kl"], rel=1e-5)
            assert shown["all"]["perplexity"] == pytest.approx(seen.measures()["perplexity"], rel=1e-5)
            for i, source in enumerate(found["rows"][part]["sources"]):
                assert shown["sources"][source]["nll"] == pytest.approx(seen.measures(i)["nll"], rel=1e-5)
    teacher = entry(found, "teacher")["parts"]["special"]["all"]
    assert teacher["kl"] == 0 and teacher["agreement"] == 1
    assert set(found["rows"]["special"]["sources"]) == {"a", "b"}


def test_the_student_came_nearer_and_the_gap_is_right(done):
    found = read(done[0])
    before, after, twin = (entry(found, n)["parts"]["special"]["all"] for n in ("before", "after", "untrained twin"))
    assert 0 < after["kl"] < before["kl"]
    assert after["gap_closed"] == pytest.approx(1 - after["kl"] / before["kl"]) and 0 < after["gap_closed"] < 1
    assert twin["gap_closed"] == pytest.approx(0, abs=1e-6) and "gap_closed" not in before


def test_size_and_speed(done):
    run, module = done
    found = read(run)
    for name, model in (("teacher", module.teacher_model()), ("after", module.policy)):
        own = entry(found, name)
        assert own["parameters"] == sum(p.numel() for p in model.parameters()) and own["bytes"] == 4 * own["parameters"]
        assert own["tokens_per_second"] > 0


def test_files_are_there_and_say_the_same(done):
    run, _ = done
    page = (run / "distill_report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for name in ("teacher", "before", "after", "untrained twin"):
        assert sum(line.startswith(f"| {name} |") for line in rows) == 2  # special and general
        assert sum(line.startswith(f"| {source} | {name} |") for source in "ab" for line in rows) == 2
    after = entry(read(run), "after")["parts"]["special"]["all"]
    assert f"{after['kl']:.3g}" in page and f"{100 * after['gap_closed']:.1f} %" in page
    assert len({line.count(" | ") for line in rows if line.startswith("| after")}) == 1
    image = imread(run / "distill_report.png")
    assert image.shape[0] > 400 and image.shape[1] > 800
    assert len(np.unique((image[..., :3] * 255).round().astype(int) @ [65536, 256, 1])) > 20
    assert not list(run.glob(".*partial"))


def test_loggers_get_the_numbers_and_wandb_table_and_image(tmp_path, folder):
    logger = WandbLogger(project="test", save_dir=str(tmp_path), offline=True)
    fit(tmp_path, folder, [report(folder, task="none", speed_tokens=0)], steps=2, logger=[logger])
    summary = dict(logger.experiment.summary)
    media = Path(logger.experiment.dir)
    logger.experiment.finish()
    after = entry(read(tmp_path), "after")["parts"]
    assert summary["report/after/special/kl"] == pytest.approx(after["special"]["all"]["kl"])
    assert summary["report/after/general/gap_closed"] == pytest.approx(after["general"]["all"]["gap_closed"])
    tables = [json.loads(p.read_text()) for p in media.rglob("*.table.json")]
    assert len(tables) == 2 and all([row[0] for row in t["data"]] == ["teacher", "before", "after"] for t in tables)
    assert len(list(media.rglob("*.png"))) == 1


def test_training_is_bit_for_bit_the_same_with_and_without(tmp_path, folder):
    """Dropout draws from the generator at every step: one number drawn by the report would show."""
    weights, metrics = [], []
    for name, callbacks in (("without", []), ("with", [report(folder)])):
        module = fit(tmp_path / name, folder, callbacks, limit_val_batches=2, val_check_interval=2)
        weights.append({n: p.detach().clone() for n, p in module.named_parameters()})
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        kept = ("train/", "val/")
        metrics.append([{k: v for k, v in row.items() if k.startswith(kept)} for row in rows])
        assert all(m.training for m in module.policy.modules())
        assert not any(m.training for m in module.teacher_model().modules())
    assert weights[0] and all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert [row for row in metrics[0] if row] == [row for row in metrics[1] if row]
    start = ModelSpec(name=str(folder / "student")).build().state_dict()
    assert any(not torch.equal(weights[0][f"policy.{n}"], p) for n, p in start.items() if f"policy.{n}" in weights[0])


def test_the_clock_does_not_count_it(tmp_path, folder):
    meter = Throughput(warmup=1)
    fit(tmp_path, folder, [report(folder), meter], steps=4)
    held = meter.summary()
    assert held["measured_steps"] == 3 and held["data_wait_fraction"] < 0.9


def test_law_6_a_resumed_run_keeps_what_was_before(tmp_path, folder):
    """'Before' is the student before step 0, not the one that the second attempt starts from."""
    fit(tmp_path, folder, [report(folder), Checkpoint()], steps=6)
    first = read(tmp_path)
    fit(tmp_path, folder, [report(folder), Checkpoint()], steps=12, resume=True)
    second = read(tmp_path)
    assert second["step"] == 12 and entry(second, "before") == entry(first, "before")
    kls = [entry(r, "after")["parts"]["special"]["all"]["kl"] for r in (first, second)]
    assert kls[1] < kls[0] and second["notes"] == []


def test_law_6_without_its_file_a_resumed_run_says_so(tmp_path, folder):
    fit(tmp_path, folder, [Checkpoint()], steps=6)
    fit(tmp_path, folder, [report(folder), Checkpoint()], steps=12, resume=True)
    found = read(tmp_path)
    assert [m["name"] for m in found["models"]] == ["teacher", "after"]
    assert "no gap could be computed" in found["notes"][0] and "no gap" in (tmp_path / "distill_report.md").read_text()


def test_law_6_other_rows_give_no_gap(tmp_path, folder):
    fit(tmp_path, folder, [report(folder), Checkpoint()], steps=6)
    fit(tmp_path, folder, [report(folder, max_rows=7), Checkpoint()], steps=12, resume=True)
    found = read(tmp_path)
    assert "gap_closed" not in entry(found, "after")["parts"]["special"]["all"]
    assert any("other special rows" in note for note in found["notes"])


def test_a_cached_teacher_is_loaded_or_left_out(tmp_path, folder, done):
    quick = {"task": "none", "speed_tokens": 0}
    fit(tmp_path / "load", folder, [report(folder, **quick)], live=False)
    loaded = entry(read(tmp_path / "load"), "after")["parts"]["special"]["all"]
    assert loaded["kl"] == pytest.approx(entry(read(done[0]), "after")["parts"]["special"]["all"]["kl"], rel=1e-6)
    fit(tmp_path / "skip", folder, [report(folder, teacher="skip", **quick)], live=False)
    found = read(tmp_path / "skip")
    assert [m["name"] for m in found["models"]] == ["before", "after"] and "teacher: skip" in found["notes"][0]
    after = entry(found, "after")["parts"]["special"]["all"]
    assert after["kl"] is None and after["gap_closed"] is None and after["nll"] == pytest.approx(loaded["nll"])
    assert (tmp_path / "skip" / "distill_report.png").stat().st_size > 10_000


def test_an_export_of_another_run_is_a_baseline(tmp_path, folder):
    fit(tmp_path / "one", folder, [Export(console=False)])
    fit(tmp_path / "two", folder, [report(folder, baselines={"first run": str(tmp_path / "one")})])
    found = read(tmp_path / "two")
    mine, theirs = (entry(found, name)["parts"]["special"]["all"] for name in ("after", "first run"))
    assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-6)
    assert mine["gap_closed"] == pytest.approx(theirs["gap_closed"], rel=1e-5)


@pytest.mark.parametrize(("layout", "pack_to"), [("packed", None), ("padded", None), ("packed", 300)])
def test_ranks_share_the_rows_without_loss_or_repeat(folder, layout, pack_to):
    data = chat(folder, layout=layout, pack_to=pack_to)
    rows = held_rows(data, None, 11 if pack_to is None else 2)
    every = sorted(rows.rows.tolist())
    assert len(every) > 4 and len(set(every)) == len(every)
    for world in (1, 2, 3):
        shares = [list(rows.batches(data, rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        real = [
            row
            for share in shares
            for batch in share
            for i, row in enumerate(batch.rows.tolist())
            if float(batch.loss_mask[batch.document_ids == i].sum()) > 0
        ]
        assert sorted(real) == every


class OnTwoRanks(NamedTuple):
    """Reports of runs on two ranks by name, the folder of their inputs, and general rows that the teacher knows."""

    found: dict
    inputs: Path
    known: int


@pytest.fixture(scope="module")
def on_two_ranks(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    inputs = out / "inputs"
    shutil.copytree(folder, inputs, ignore=shutil.ignore_patterns("cache"))
    known = let_teacher_know(inputs)
    args = {"folder": str(inputs), "out": str(out)}
    found = run_ranks("tests.callbacks.distill_parts:on_ranks", 2, args, timeout=400)[0]
    return OnTwoRanks(found, inputs, known)


def test_law_1_two_ranks_and_zero_3_give_the_numbers_of_one(on_two_ranks):
    found, copy, _ = on_two_ranks
    data = chat(copy)
    size = len(data.renderer.tokenizer)
    start = ModelSpec(name=str(copy / "student")).build()
    teacher = ModelSpec(name=str(copy / "teacher")).build()
    for name in ON_RANKS:
        for part, sources in (("special", None), ("general", [Source(path=str(copy / "general.jsonl"))])):
            rows = held_rows(data, sources, 512)
            alone = compare_models(start, teacher, rows.batches(data, 0, 1), size, sources=len(rows.sources)).measures()
            shown = entry(found[name], "before")["parts"][part]["all"]
            for key, value in alone.items():
                assert shown[key] == pytest.approx(value, rel=1e-5), (name, part, key)
            asked = rows.questions(data.renderer, "exact", 64)
            assert shown.get("questions") == (None if "alone" in name else len(asked))
            assert part == "special" or len(asked) == 12
        twin = entry(found[name], "untrained twin")["parts"]["special"]["all"]
        assert twin["kl"] == pytest.approx(entry(found[name], "before")["parts"]["special"]["all"]["kl"], rel=1e-5)
        own = entry(found[name], "teacher")
        assert own["parameters"] == sum(p.numel() for p in teacher.parameters())
        assert own["bytes"] == 4 * own["parameters"]
        after = entry(found[name], "after")
        assert 0 < after["parts"]["special"]["all"]["gap_closed"] < 1
        assert after["parameters"] == sum(p.numel() for p in start.parameters()) and after["tokens_per_second"] > 0


def test_law_7_a_sharded_teacher_generates_as_a_whole_one_does(on_two_ranks):
    """Its ranks answer shares of the questions, and rank 0 measures the speed, also where it alone runs the model."""
    found, _, known = on_two_ranks
    for name, placement in ON_RANKS.items():
        if "no-room" in name:
            continue
        own, whole = entry(found[name], "teacher"), entry(found["ddp"], "teacher")
        assert own["tokens_per_second"] > 0 and found[name]["notes"] == [], (name, placement)
        assert {k: own[k] for k in ("parameters", "bytes")} == {k: whole[k] for k in ("parameters", "bytes")}
        for part in ("special", "general"):
            shown = own["parts"][part]["all"]
            expected = {k: v for k, v in whole["parts"][part]["all"].items() if k in shown}
            assert shown == pytest.approx(expected, rel=1e-5), (name, part)
        general = own["parts"]["general"]["all"]
        if "alone" not in name:
            assert general["accuracy"] == known / general["questions"] and 0 < general["accuracy"] < 1


def test_law_7_where_one_rank_has_no_room_no_rank_makes_the_teacher_whole(on_two_ranks):
    found = on_two_ranks.found["zero3-no-room-on-rank-1"]
    own = entry(found, "teacher")
    assert own["tokens_per_second"] is None and own["parts"]["general"]["all"].keys().isdisjoint({"accuracy"})
    assert own["parts"]["general"]["all"]["perplexity"] > 1
    assert "a rank has too little memory free for its 0.0 GiB" in found["notes"][0]
    assert "`teacher` is sharded, so its answers and its speed were not measured" in found["notes"][1]
    assert entry(found, "after")["parts"]["general"]["all"]["questions"] == 12


# ---- answers ----


def test_questions_are_the_rows_own_prompts_and_answers(folder):
    data = chat(folder)
    rows = held_rows(data, [Source(path=str(folder / "general.jsonl"))], 512)
    asked = rows.questions(data.renderer, "number", 64)
    texts = {text_of(data.renderer, question.answer) for question in asked}
    assert texts == {f"The answer is {a + b}." for a in range(6) for b in range(2)}
    for question in asked:
        prompt = data.renderer.tokenizer.decode(question.prompt)
        assert prompt.startswith("<|im_start|>user\nWhat is ") and prompt.endswith("<|im_start|>assistant\n")
    assert len(rows.questions(data.renderer, "exact", 5)) == 5
    words = held_rows(data, None, 512)
    assert words.questions(data.renderer, "number", 64) == []  # these answers hold no number
    assert len(words.questions(data.renderer, "exact", 99)) > 5


def test_accuracy_counts_right_answers(tmp_path):
    """A student that has learned three answers by heart gives them, and a fourth that it never saw it does not."""
    model, data = make_inputs(tmp_path / "inputs")
    module = sft(model, lr=1e-2)
    module.teacher_model = lambda: module.policy  # pyright: ignore[reportAttributeAccessIssue]
    more = [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "I do not know."}]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join([*data.read_text().splitlines()[:3], json.dumps({"messages": more})]))
    rows = real_chat(model, data)
    rows.val_sources = [Source(path=str(held), name="held")]
    runner = trainer(tmp_path, [report(tmp_path, general=None, task="exact", max_new_tokens=12)], max_steps=160)
    runner.fit(module, rows)
    found = {name: entry(read(tmp_path), name)["parts"]["special"]["all"] for name in ("before", "after")}
    assert (found["before"]["accuracy"], found["before"]["questions"]) == (0, 4)
    assert (found["after"]["accuracy"], found["after"]["questions"]) == (0.75, 4)
    assert "75.0 % of 4" in (tmp_path / "distill_report.md").read_text()


@pytest.mark.parametrize(
    ("task", "answer", "reference", "right"),
    [
        ("exact", " In  CHINA", "in China.", True),
        ("exact", "In Chile.", "In China.", False),
        ("exact", "", "In China.", False),
        ("number", "so 3 + 4 = 7 apples", "#### 7", True),
        ("number", "it costs $1,000.50", "1000.5", True),
        ("number", "5-3", "3", True),
        ("number", "it is -3", "3", False),
        ("number", "seven", "7", False),
        ("number", "7", "seven", False),
    ],
)
def test_answers_are_held_against_the_reference(task, answer, reference, right):
    assert is_right(task, answer, reference) is right


def test_the_last_number_of_a_text():
    assert last_number("1, 2, 3,456") == 3456 and last_number("version 1.2.3") is not None
    assert last_number("none") is None and float(last_number("x = -0.25") or 0) == -0.25


# ---- refusals ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "maths"}, "task must be one of none, exact, number"),
        ({"teacher": "cache"}, "teacher must be one of load, skip"),
        ({"max_rows": 0}, "max_rows must be 1 or more"),
        ({"speed_tokens": -1}, "speed_tokens must be 0 or more"),
        ({"baselines": {"after": "/nowhere"}}, "choose a name"),
        ({"baselines": {"sft": "/nowhere"}}, "no model in /nowhere"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        DistillReport(**options)


def test_what_it_cannot_run_with_is_told_before_training(tmp_path, folder):
    with pytest.raises(ValueError, match="needs an objective with a teacher, got Toy"):
        trainer(tmp_path, [DistillReport()]).fit(Toy(), loader([packed([4, 4], 2)]))
    with pytest.raises(ValueError, match=r"set data\.val_fraction"):
        trainer(tmp_path, [DistillReport()]).fit(objective(folder), chat(folder, held_out=0.0))
    other = tiny.save_folder(tmp_path / "other", tiny.make_tokenizer(special=("<|im_end|>", "<|im_start|>")))
    with pytest.raises(ValueError, match="differs from data.tokenizer from id 0 on"):
        trainer(tmp_path, [report(folder, baselines={"x": str(other)})]).fit(objective(folder), chat(folder))


def test_an_infinite_distance_is_written_and_read_again(tmp_path, folder):
    """JSON has no infinity: it is spelt, and drawn as nothing."""
    from ptl.callbacks.report_numbers import from_json, json_ready
    from ptl.callbacks.report_page import draw, markdown

    fit(tmp_path, folder, [report(folder, task="none", speed_tokens=0)], steps=1)
    found = read(tmp_path)
    entry(found, "after")["parts"]["special"]["all"]["kl"] = math.inf
    spelt = json.loads(json.dumps(json_ready(found), allow_nan=False))
    assert "| inf |" in markdown(spelt)
    draw(spelt, tmp_path / "again.png")
    assert from_json(spelt["models"][2])["parts"]["special"]["all"]["kl"] == math.inf
