"""The file of pass rates that an evaluation leaves: what is in it, that it is one, and that it is a source again."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from ptl import cli
from ptl.callbacks.pass_rates import FILE, PassRates
from ptl.data.sources import Source
from ptl.rewards.base import Completion, Failure, Outcome, Reward
from ptl.rollout.evaluation import Evaluation, Rated
from tests import tiny
from tests.objectives import law, ppo_rl, rl
from tests.ranks import rank, run_ranks, world_size

SAMPLES = 4


class Known(Reward):
    """What each question's answers are worth, by their order: as many are right as the question's ``right`` says."""

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        seen: dict[str, int] = {}
        found: list[Outcome] = []
        for completion in completions:
            key, right = str(completion.prompt.origin), completion.prompt.meta["right"]
            place = seen[key] = seen.get(key, -1) + 1
            failed = right is None or (right == "half" and place % 2)
            found.append(
                Failure("raised", "no verdict") if failed else float(place < (1 if right == "half" else right))
            )
        return found


def make_folder(folder: Path, rights: Sequence[Any] = (0, 4, 1, "half", None, 3, 2)) -> Path:
    """A tiny model, and prompts that are answered right as often as they say."""
    tokenizer = rl.word_tokenizer([*law.WORDS, "a"])
    tiny.save_folder(folder / "model", tokenizer, tie=False)
    rows = [
        {"question": " ".join(law.WORDS[: i + 1]), "answer": "a", "right": right, "tag": {"n": i}, "pass_rate": 0.9}
        for i, right in enumerate(rights)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


RATES = {1: 0.0, 2: 1.0, 3: 0.25, 4: 0.5, 6: 0.75, 7: 0.5}
"""By line of the file; nobody can tell of line 5."""


def built(folder: str, make: Any = rl):
    evaluation = Evaluation(samples=SAMPLES, k=[1], solved_by="known", temperature=1.0)
    options = {"rewards": [Known()], "evaluation": evaluation, "error_limit": 1.0, "micro": 2}
    objective, module = make.build(folder, **options)
    module.val_sources = module.train_sources
    return objective, module


def validated(folder: str, run: str, strategy: str = "auto", ranks: int = 1, make: Any = rl, **trainer: Any):
    objective, data = built(folder, make)
    made = law.trainer_of(run, strategy, ranks, 1, callbacks=[PassRates()], **trainer)
    made.validate(objective, datamodule=data, verbose=False)
    return objective, made


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("rates"))


@pytest.mark.parametrize("make", [rl, ppo_rl], ids=["grpo", "ppo"])
def test_each_prompt_has_its_share_of_right_answers(folder, tmp_path, caplog, make):
    with caplog.at_level(logging.WARNING, logger="ptl.callbacks.pass_rates"):
        validated(str(folder), str(tmp_path), make=make)
    rows = read(tmp_path)
    assert {int(row["origin"].rsplit(":", 1)[1]): row["pass_rate"] for row in rows} == RATES
    assert [row["origin"] for row in rows] == [f"{folder}/rows.jsonl:{line}" for line in RATES]
    assert [row["samples"] for row in rows] == [2 if line == 4 else SAMPLES for line in RATES]
    assert rows[1]["prompt"] == [{"role": "user", "content": "the quick"}] and rows[1]["answer"] == "a"
    assert rows[1]["tag"] == {"n": 1} and rows[1]["right"] == 4
    assert "1 of 7 prompts are not in pass_rates.jsonl" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [FILE]


def test_the_file_is_what_the_filter_and_the_order_read(folder, tmp_path):
    objective, _ = validated(str(folder), str(tmp_path))
    sources = [Source(path=str(tmp_path / FILE), pass_rate=[0.25, 0.75])]
    data = rl.data_of(str(folder), objective.view, micro=1, easy_first=True)
    data.train_sources = sources
    data.setup("fit")
    [entry] = data.audits["train"].sources
    assert (entry.rows, entry.kept, entry.dropped_by("pass_rate"), entry.refused_rows) == (6, 4, 2, 0)
    rows = [int(batch.rows[0]) for batch in data.train_dataloader()]
    lines = data.rows("train", rows)
    assert [round(float(row["pass_rate"]), 2) for row in lines] == [0.75, 0.5, 0.5, 0.25]
    _, original = built(str(folder))
    original.setup("fit")
    asked = {tuple(row["ids"].tolist()) for row in original.rows("train", list(range(7)))}
    assert {tuple(row["ids"].tolist()) for row in lines} < asked  # the same tokens as in the file they came from


def test_the_latest_evaluation_of_a_fit_is_kept_and_a_sanity_check_writes_nothing(folder, tmp_path):
    written: list[tuple[bool, bool]] = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            written.append((trainer.sanity_checking, (tmp_path / FILE).exists()))
            (tmp_path / FILE).unlink(missing_ok=True)

    objective, data = built(str(folder))
    options = {"num_sanity_val_steps": 1, "max_epochs": -1, "max_steps": 4, "val_check_interval": 2}
    trainer = law.trainer_of(str(tmp_path), "auto", 1, 1, callbacks=[PassRates(), Watch()], **options)
    trainer.fit(objective, datamodule=data)
    assert written == [(True, False), (False, True), (False, True)]


def test_an_evaluation_that_was_cut_rates_what_it_saw(folder, tmp_path):
    validated(str(folder), str(tmp_path), limit_val_batches=1)
    assert 0 < len(read(tmp_path)) <= 2


def test_a_test_run_writes_them_too(folder, tmp_path):
    objective, data = built(str(folder))
    law.trainer_of(str(tmp_path), "auto", 1, 1, callbacks=[PassRates()]).test(objective, datamodule=data, verbose=False)
    assert len(read(tmp_path)) == len(RATES)


def test_objectives_without_answers_write_nothing(tmp_path):
    law.make_folder(tmp_path)
    objective, data = law.build(str(tmp_path))
    data.val_fraction = 0.3
    trainer = law.trainer_of(str(tmp_path / "run"), "auto", 1, 1, callbacks=[PassRates()])
    trainer.validate(objective, datamodule=data, verbose=False)
    assert not (tmp_path / "run" / FILE).exists()


@pytest.mark.parametrize(
    ("solved", "rated"),
    [([True, False, True, None], (2, 3, 2 / 3)), ([None, None], (0, 0, None)), ([False], (0, 1, 0.0))],
)
def test_a_rate_is_of_the_answers_that_were_judged(solved, rated):
    one = Rated.of(5, solved)
    assert (one.row, one.right, one.judged, one.rate) == (5, *rated)


# ---- several ranks ----


def on_ranks(folder: str, run: str) -> dict[str, Any]:
    """Runs in each rank process: an evaluation that is shared, and one whose file cannot be written."""
    objective, _ = validated(folder, f"{run}/whole", "ddp", world_size())
    told = ""
    if rank() == 0:
        Path(run, "blocked").mkdir()
        Path(run, "blocked", FILE).mkdir()  # a folder of the file's name
    try:
        validated(folder, f"{run}/blocked", "ddp", world_size())
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return {"own": sorted(one.row for one in objective.rollouts.rated), "told": told}


@pytest.mark.timeout(400)
def test_all_ranks_prompts_are_in_one_file_and_a_failed_write_stops_all(folder, tmp_path):
    found = run_ranks("tests.callbacks.test_pass_rates:on_ranks", 2, {"folder": str(folder), "run": str(tmp_path)})
    assert found[0]["own"] and found[1]["own"] and not set(found[0]["own"]) & set(found[1]["own"])
    rows = read(tmp_path / "whole")
    assert {int(row["origin"].rsplit(":", 1)[1]): row["pass_rate"] for row in rows} == RATES
    assert [row["origin"] for row in rows] == [f"{folder}/rows.jsonl:{line}" for line in RATES]
    assert found[0]["told"].startswith("IsADirectoryError")
    assert (
        found[1]["told"] == "RuntimeError: another rank failed while it wrote the pass rates; its own message says why"
    )


# ---- by the command line ----


def test_the_command_writes_it_without_being_asked(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    reward = {"class_path": "tests.objectives.rl.Vowels"}
    source = f"[{{path: {folder}/rows.jsonl}}]"
    code = cli.main(
        [
            "validate", "--model", "ptl.objectives.grpo.GRPO", "--model.policy.name", f"{folder}/model",
            "--model.rewards", json.dumps([reward]), "--model.rollout.max_new_tokens", "4",
            "--model.evaluation.samples", "2", "--data.train", source, "--data.val", source,
            "--data.preparation.num_proc", "1", "--run.dir", str(tmp_path / "run"),
            "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false",
        ]
    )  # fmt: skip
    assert code == 0, capfd.readouterr().err
    assert len(read(tmp_path / "run")) == 7
