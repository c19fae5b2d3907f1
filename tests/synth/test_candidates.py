"""Candidates: what stands in a row, what is left out, and that kills and processes change nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ptl.data.records import parse_row
from ptl.data.sources import Source, detect_format
from ptl.rollout.sampling import Sampled, sample
from ptl.synth import candidates
from ptl.synth.candidates import Sampling, write_candidates
from ptl.synth.questions import ends
from ptl.synth.shares import Shares
from ptl.types import Message, Origin
from tests import forks
from tests.ranks import ROOT, rank, run_ranks, world_size
from tests.synth import parts

SETTINGS = {"model": "0123456789abcdef", "renderer": "r", "k": 3, "max_new_tokens": 10, "batch_tokens": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parts.make_folder(tmp_path_factory.mktemp("candidates"), rows=14)


@pytest.fixture(scope="module")
def model(folder):
    return parts.teacher_of(folder)


@pytest.fixture(scope="module")
def renderer(folder):
    return parts.data_of(folder).renderer


def write(folder, out, *, model=None, rows: Any = None, rank: int = 0, world_size: int = 1, report=None, **settings):
    """Candidates for the folder's rows, or for ``rows``, which are written beside the file first."""
    source = Source(path=f"{folder}/rows.jsonl")
    if rows is not None:
        source = Source(path=str(out) + ".prompts.json")
        Path(source.path).write_text(json.dumps(rows))
    options = {"keep_unfinished": True, **SETTINGS, **settings}
    return write_candidates(
        model or parts.teacher_of(Path(folder)),
        [source],
        [detect_format(source, rows or [{"messages": []}])],
        parts.data_of(Path(folder)).renderer,
        Path(out),
        Sampling(**options),
        name="teacher",
        rank=rank,
        world_size=world_size,
        report=report or (lambda prompts: None),
    )


def killed(folder: str, out: str, batches: int, torn: bool) -> None:
    """The process is killed after so many batches; ``torn``, in the middle of writing the next."""
    done = []

    def report(prompts: int) -> None:
        done.append(prompts)
        if len(done) == batches:
            if torn:
                with open(f"{out}.part-0", "ab") as file:
                    file.write(b'{"id": "3-x", "prompt": []}\n{"id": "4-x", "pro')
            os.kill(os.getpid(), signal.SIGKILL)

    write(folder, out, report=report)


def in_process(folder: str, out: str) -> dict[str, Any]:
    """A rank's share, by the variables that a launcher sets."""
    done: list[int] = []
    written = write(folder, out, rank=rank(), world_size=world_size(), report=done.append)
    return {"own": sum(done), "rows": written.rows}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, model, tmp_path_factory):
    """The file of a run that nothing disturbed, and what it told."""
    path = tmp_path_factory.mktemp("whole") / "c.jsonl"
    return path, write(folder, path, model=model)


def test_a_row_holds_the_prompt_and_the_models_answers(folder, model, renderer, whole):
    path, written = whole
    made, given = rows_of(path), rows_of(folder / "rows.jsonl")
    assert written.rows == len(made) > 10 and written.answers == sum(len(row["completions"]) for row in made)
    assert [row["id"].partition("-")[0] for row in made] == sorted(
        (row["id"].partition("-")[0] for row in made), key=int
    )
    stop = ends(model, renderer)
    for row in made:
        number = int(row["id"].partition("-")[0])
        asked = [{"role": m["role"], "content": m["content"]} for m in given[number]["messages"][:-1]]
        assert row["prompt"] == asked and row["annotator"] is None
        assert row["origin"] == f"{folder}/rows.jsonl:{number + 1}"
        ids = renderer.prompt([Message(**message) for message in asked])
        how = {"stop": stop, "limits": [10], "vocab": len(renderer.tokenizer), "temperature": 1.0, "top_p": 1.0}
        drawn = sample(model, [ids], [number], samples=3, seed=0, **how)[0]
        assert len({completion["meta"]["sample"] for completion in row["completions"]}) == len(row["completions"])
        for completion in row["completions"]:
            meta = completion["meta"]
            answer = drawn[meta["sample"]]
            ended = answer.ids[-1] in stop
            text = renderer.tokenizer.decode(answer.ids[: len(answer.ids) - ended], skip_special_tokens=True)
            assert completion["messages"] == [{"role": "assistant", "content": text}] and completion["rank"] is None
            assert meta == {
                "seed": 0,
                "number": number,
                "sample": meta["sample"],
                "logprob": pytest.approx(sum(answer.logprobs), abs=1e-3),
                "tokens": len(answer.ids),
                "finished": ended,
                "temperature": 1.0,
                "top_p": 1.0,
                "model": "teacher@0123456789ab",
            }


def test_a_ranked_row_is_a_ranking(whole):
    row = rows_of(whole[0])[0]
    row["annotator"] = "ann"
    for place, completion in enumerate(row["completions"]):
        completion["rank"] = place + 1
    source = Source(path="x")
    assert detect_format(source, [row]) == "ranking"
    record: Any = parse_row(row, "ranking", source, Origin("x", 1))
    assert [turns[0].content for turns in record.completions] == [
        completion["messages"][0]["content"] for completion in row["completions"]
    ]
    assert record.ranks == tuple(range(1, len(row["completions"]) + 1)) and record.annotator == "ann"


def test_prompts_come_from_every_record_and_a_system_turn_where_there_is_none(folder, model, tmp_path):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "mine"}, *turns]
    for name, rows in {
        "messages": [{"messages": turns}, {"messages": own}],
        "prompt": [{"question": "hello", "answer": "a"}, {"prompt": own[:2], "answer": "a"}],
        "ranking": [{"prompt": "hello", "chosen": "a", "rejected": "b"}, {"chosen": own, "rejected": own}],
    }.items():
        out = tmp_path / f"{name}.jsonl"
        assert write(folder, out, model=model, rows=rows, system="given").rows == 2
        assert [[(m["role"], m["content"]) for m in row["prompt"]] for row in rows_of(out)] == [
            [("system", "given"), ("user", "hello")],
            [("system", "mine"), ("user", "hello")],
        ]


def test_law_8_what_is_left_out_is_counted_with_its_line(folder, model, tmp_path):
    def asked(content):
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}

    rows = [asked("hello"), {"messages": [{"role": "assistant", "content": "I begin"}]}, asked("hello world " * 300)]
    rows += [{"messages": 3}, asked("world")]
    out = tmp_path / "c.jsonl"
    written = write(folder, out, model=model, rows=rows)
    assert (written.prompts, written.rows) == (3, 2)
    assert written.left_out == {"no_question": 1, "too_long": 1, "wrong_type": 1}
    assert {reason: at.rpartition(":")[2] for reason, at in written.first.items()} == {
        "no_question": "2",
        "too_long": "3",
        "wrong_type": "4",
    }
    assert write(folder, out, model=model, rows=rows)[:5] == written[:5]
    with pytest.raises(ValueError, match=r"no row has a prompt \(1 are left out, the first: .*:1: no_question: "):
        write(folder, tmp_path / "d.jsonl", model=model, rows=rows[1:2])


def test_answers_that_are_the_same_empty_or_cut_are_dropped_and_counted(folder, model, renderer, tmp_path, monkeypatch):
    texts = {0: ["a b", " a  b\n", "c", "c", "d"], 1: ["a", "a", "a", "a ", " "], 2: ["a", "b", "", "c", "d"]}
    end = renderer.terminators[0]

    def drawn(model, prompts, numbers, **how):
        ids = [[renderer.tokenizer.encode(text) for text in texts[number]] for number in numbers]
        return [
            [
                Sampled([*own, *([] if text == "d" else [end])], [-0.5] * (len(own) + 1))
                for own, text in zip(each, texts[n])
            ]
            for each, n in zip(ids, numbers)
        ]

    monkeypatch.setattr(candidates, "sample", drawn)
    rows = [{"prompt": text} for text in ("hello", "world", "fox")]
    written = write(folder, tmp_path / "c.jsonl", model=model, rows=rows, k=5, keep_unfinished=False)
    said = [[c["messages"][0]["content"] for c in row["completions"]] for row in rows_of(tmp_path / "c.jsonl")]
    assert said == [["a b", "c"], ["a", "b", "c"]]
    assert written.left_out == {"too_few_answers": 1} and written.answers == 5
    assert written.dropped == {"duplicate": 2 + 3, "unfinished": 2, "empty": 2}
    write(folder, tmp_path / "d.jsonl", model=model, rows=rows, k=5)
    kept = rows_of(tmp_path / "d.jsonl")[0]["completions"]
    assert [(c["messages"][0]["content"], c["meta"]["finished"]) for c in kept] == [
        ("a b", True),
        ("c", True),
        ("d", False),
    ]


def test_a_model_that_gives_nan_is_refused(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        candidates, "sample", lambda m, prompts, n, **how: [[Sampled([5], [float("nan")])] * 3 for _ in prompts]
    )
    with pytest.raises(ValueError, match="not finite"):
        write(folder, tmp_path / "c.jsonl", model=model)


@pytest.mark.parametrize("torn", [False, True])
def test_law_6_killed_and_started_again_the_file_is_the_same(folder, model, whole, tmp_path, torn):
    out = tmp_path / "c.jsonl"
    code = f"from tests.synth.test_candidates import killed; killed({str(folder)!r}, {str(out)!r}, 2, {torn})"
    run = forks.run(["-c", code], cwd=ROOT)
    assert run.returncode == -9, run.stderr
    assert not out.exists()
    before = (tmp_path / "c.jsonl.part-0").read_bytes()
    assert before.endswith(b'"pro') == torn
    done: list[int] = []
    written = write(folder, out, model=model, report=done.append)
    assert written == whole[1] and out.read_bytes() == whole[0].read_bytes()
    assert 0 < sum(done) < written.prompts
    write(folder, out, model=model, report=lambda prompts: pytest.fail("nothing was left to do"))
    assert out.read_bytes() == whole[0].read_bytes()


def test_law_7_processes_share_the_prompts_and_write_the_same_file(folder, whole, tmp_path):
    out = tmp_path / "c.jsonl"
    told = run_ranks("tests.synth.test_candidates:in_process", 2, {"folder": str(folder), "out": str(out)})
    assert out.read_bytes() == whole[0].read_bytes()
    assert all(each["own"] > 0 for each in told) and sum(each["own"] for each in told) == whole[1].prompts
    assert whole[1].rows in [each["rows"] for each in told]  # the last one; the other may have been done before it


def test_no_file_until_the_last_is_done_and_their_number_may_change(folder, model, whole, tmp_path):
    out = tmp_path / "c.jsonl"
    assert write(folder, out, model=model, rank=1, world_size=3).rows is None
    with (tmp_path / "c.jsonl.part-1").open("ab") as file:
        file.write(b'{"id": "0-x"}\n')  # another process may be in the middle of a batch; its part is not ours to cut
    assert not out.exists()
    done: list[int] = []
    assert write(folder, out, model=model, rank=0, world_size=1, report=done.append) == whole[1]
    assert out.read_bytes() == whole[0].read_bytes() and sum(done) < whole[1].prompts
    assert (tmp_path / "c.jsonl.part-1").read_bytes().endswith(b'{"id": "0-x"}\n')


def test_a_file_of_other_settings_or_prompts_is_not_gone_on_with(folder, model, tmp_path):
    out = tmp_path / "c.jsonl"
    rows = [{"prompt": "hello"}, {"prompt": "world"}]
    first = write(folder, out, model=model, rows=rows)
    for changed in (
        {"k": 4},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 1},
        {"system": "s"},
        {"renderer": "other"},
    ):
        with pytest.raises(ValueError, match=f"begun with other settings .{next(iter(changed))} "):
            write(folder, out, model=model, rows=rows, **changed)
    with pytest.raises(ValueError, match=r":2: .* begun with other prompts"):
        write(folder, out, model=model, rows=[rows[0], {"prompt": "fox"}])
    before = out.read_bytes()
    assert write(folder, out, model=model, rows=rows, batch_tokens=9) == first and out.read_bytes() == before
    more = write(folder, out, model=model, rows=[*rows, {"prompt": "fox"}])
    assert more.rows == 3 and out.read_bytes().startswith(before)
    (tmp_path / "c.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="not begun by this command"):
        write(folder, out, model=model, rows=rows)
    out.unlink()
    with pytest.raises(ValueError, match="begun with other prompts"):  # parts that were left there say so themselves
        write(folder, out, model=model, rows=rows, seed=1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"k": 1}, "--k"),
        ({"temperature": 0.0}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"top_p": 0.0}, "--top-p"),
        ({"top_p": 1.1}, "--top-p"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"batch_tokens": 0}, "--batch-tokens"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_its_option(settings, told):
    with pytest.raises(ValueError, match=told):
        Sampling(**{**SETTINGS, **settings})


def entry(number, reason=None):
    return {"number": number, "reason": reason}


def test_shares_are_joined_in_order_and_say_which_part_is_broken(tmp_path):
    path = tmp_path / "f.jsonl"
    one, ten = Shares(path, 1), Shares(path, 10)
    ten.append([{"id": "é"}], [entry(2), entry(5, "too_long")])
    assert one.join([0, 2, 5]) is None and not path.exists()
    one.append([{"id": 3}, {"id": 0}], [entry(3), entry(0)])
    ten.append([{"id": "later"}], [entry(3)])
    joined = one.join([0, 2, 3, 5])
    assert joined is not None and [done.entry["reason"] for done in joined] == [None, None, None, "too_long"]
    assert path.read_text() == '{"id": 0}\n{"id": "é"}\n{"id": 3}\n'
    for broken in (
        '{"batch": [{"number": 7}]}\n',
        '{"batch": [{"number": 7, "reason": null}]}\n',
        '{"id": 1}\n{"batch": []}\n',
    ):
        (tmp_path / "f.jsonl.part-2").write_text(broken)
        with pytest.raises(ValueError, match=r"part-2: .*delete this part"):
            one.join([0])
