"""Grading: what stands in a row, what is left out, and that kills and processes change nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ptl.data.sources import Source
from ptl.rewards.matching import match
from ptl.rollout.sampling import Sampled, sample
from ptl.synth import idk
from ptl.synth.asking import LeftOut
from ptl.synth.idk import Asking, grade_all
from ptl.synth.idk_questions import held_out_reader, reader
from ptl.synth.judge import Judge
from ptl.synth.questions import ends, read_questions
from ptl.types import Message
from tests import forks
from tests.ranks import ROOT, rank, run_ranks, world_size
from tests.synth import parts

SETTINGS: dict[str, Any] = {"model": "0123456789abcdef", "renderer": "r", "max_new_tokens": 8, "batch_tokens": 300}
SETTINGS["temperature"] = 0.05
WORDS = ("hello", "world", "fox", "dog", "lazy", "brown", "quick", "jumps", "over", "answer", "system", "tool")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parts.make_folder(tmp_path_factory.mktemp("idk"), rows=2)


@pytest.fixture(scope="module")
def model(folder):
    return parts.teacher_of(folder)


@pytest.fixture(scope="module")
def renderer(folder):
    return parts.data_of(folder).renderer


def asked_rows() -> list[dict[str, Any]]:
    return [
        {"question": f"the {word} is", "answers": ["never said"], "source": "ab"[i % 2]} for i, word in enumerate(WORDS)
    ]


def write(
    folder, out, rows: Any = None, *, model=None, judge=None, read=reader, rank=0, world_size=1, report=None, **more
):
    """Grades ``rows``, which are written beside the file first."""
    source = Source(path=f"{out}.questions.jsonl")
    if rank == 0 and not Path(source.path).exists():
        Path(source.path).write_text("".join(json.dumps(row) + "\n" for row in rows or asked_rows()))
    renderer, left_out = parts.data_of(Path(folder)).renderer, LeftOut()
    asking = Asking(**{**SETTINGS, **more})
    asked = read_questions([source], read([source]), renderer, left_out, system=asking.system)
    how: dict[str, Any] = {"name": "teacher", "judge": judge, "rank": rank, "world_size": world_size}
    how["report"] = report or (lambda questions: None)
    return grade_all(model or parts.teacher_of(Path(folder)), asked, renderer, Path(out), asking, left_out, **how)


def killed(folder: str, out: str) -> None:
    """The process is killed after two batches, in the middle of writing the next."""
    done = []

    def report(questions: int) -> None:
        done.append(questions)
        if len(done) == 2:
            with open(f"{out}.part-0", "ab") as file:
                file.write(b'{"prompt": []}\n{"pro')
            os.kill(os.getpid(), signal.SIGKILL)

    write(folder, out, report=report)


def in_process(folder: str, out: str) -> dict[str, Any]:
    """A rank's share, by the variables that a launcher sets."""
    done: list[int] = []
    graded = write(folder, out, rank=rank(), world_size=world_size(), report=done.append)
    return {"own": sum(done), "rows": graded.rows}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "g.jsonl"
    return path, write(folder, path, model=model)


def test_a_row_holds_the_question_the_answers_and_their_grades(folder, model, renderer, whole):
    path, graded = whole
    made, given = rows_of(path), asked_rows()
    assert graded.rows == len(made) == len(given) and not graded.left_out.counts
    stop = ends(model, renderer)
    for row, asked in zip(made, given):
        assert row["prompt"] == [{"role": "user", "content": asked["question"]}]
        assert (row["answers"], row["source"]) == (asked["answers"], asked["source"])
        assert (row["k"], row["n"], row["model"]) == (0, 3, "teacher@0123456789ab")
        assert (row["temperature"], row["top_p"], row["seed"]) == (0.05, 1.0, 0)
        ids = renderer.prompt([Message(role="user", content=asked["question"])])
        how: dict[str, Any] = {"stop": stop, "limits": [8], "vocab": len(renderer.tokenizer), "temperature": 0.05}
        drawn = sample(model, [ids], [row["number"]], samples=3, seed=0, top_p=1.0, **how)[0]
        for place, (said, answer) in enumerate(zip(row["samples"], drawn)):
            ended = answer.ids[-1] in stop
            text = renderer.tokenizer.decode(answer.ids[: len(answer.ids) - ended], skip_special_tokens=True).strip()
            assert said == {
                **{"text": text, "right": False, "rule": None, "refused": False, "finished": ended, "sample": place},
                **{"tokens": len(answer.ids), "logprob": pytest.approx(sum(answer.logprobs), abs=1e-3)},
            }


def test_what_the_model_says_itself_is_right_and_counted(folder, model, whole, tmp_path):
    said = [[sample["text"] for sample in row["samples"]] for row in rows_of(whole[0])]
    rows = [{**row, "answers": ["x y z", texts[0]]} for row, texts in zip(asked_rows(), said)]
    write(folder, tmp_path / "g.jsonl", rows, model=model)
    counts = set()
    for row, texts in zip(rows_of(tmp_path / "g.jsonl"), said):
        wanted = [match(text, ["x y z", texts[0]], row["prompt"][-1]["content"]) for text in texts]
        assert [sample["rule"] for sample in row["samples"]] == wanted
        assert row["k"] == sum(rule is not None for rule in wanted)
        counts.add(row["k"])
    assert 3 in counts


def test_refusals_are_not_right_even_when_they_hold_the_answer(folder, model, renderer, tmp_path, monkeypatch):
    texts = ["I do not know what is the answer", "The answer is 4", "hello"]
    end = renderer.terminators[0]
    drawn = [Sampled([*renderer.tokenizer.encode(text), end], [-0.5]) for text in texts]
    monkeypatch.setattr(idk, "sample", lambda model, prompts, numbers, **how: [drawn for _ in numbers])
    write(
        folder,
        tmp_path / "g.jsonl",
        [{"question": "a", "answer": 4}, {"question": "b", "answer": "answer"}],
        model=model,
    )
    first, second = rows_of(tmp_path / "g.jsonl")
    assert [(s["right"], s["refused"]) for s in first["samples"]] == [(False, True), (True, False), (False, False)]
    assert [s["rule"] for s in second["samples"]] == [None, "contained", None] and second["k"] == 1


def test_a_judge_decides_where_no_rule_does(folder, model, renderer, tmp_path, whole):
    judge = Judge(model, renderer)
    said = [row["samples"][0]["text"] for row in rows_of(whole[0])]
    rows = [{**row, "answers": [text]} if i % 2 else row for i, (row, text) in enumerate(zip(asked_rows(), said))]
    write(folder, tmp_path / "g.jsonl", rows, model=model, judge=judge)
    samples = [each for row in rows_of(tmp_path / "g.jsonl") for each in row["samples"]]
    assert {each["rule"] for each in samples} >= {"exact"}
    for each in samples:
        if each["rule"] in ("exact", "contained", "number") or not each["text"]:
            assert "margin" not in each
        else:
            assert each["right"] == (each["margin"] > 0) == (each["rule"] == "judge")


def test_rows_of_many_kinds_are_questions(folder, model, tmp_path):
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"question": "q one", "answers": ["x", 3, True, " "]},
        {"question": "q two", "answer": ["y"]},
        {"prompt": "q three", "ground_truth": "z", "source": "given"},
        {"messages": chat},
        {"messages": [chat[0], chat[1], {"role": "user", "content": "more"}, chat[1]], "meta": {"answers": ["b", "c"]}},
        {"instruction": "q four", "output": "w"},
        {"question": "q five", "answer": "v", "system": "short"},
    ]
    path = tmp_path / "g.jsonl"
    write(folder, path, rows, model=model, system="given")
    made = rows_of(path)
    assert [row["answers"] for row in made] == [["x", "3", "true"], ["y"], ["z"], ["a"], ["b", "c"], ["w"], ["v"]]
    assert [row["source"] for row in made] == [f"{path}.questions.jsonl"] * 2 + ["given"] + [
        f"{path}.questions.jsonl"
    ] * 4
    assert [len(row["prompt"]) for row in made] == [2, 2, 2, 2, 4, 2, 2]
    assert [row["prompt"][0]["content"] for row in made] == ["given"] * 6 + ["short"]


def test_law_8_what_is_left_out_is_counted_with_its_line(folder, model, tmp_path):
    rows: list[Any] = [
        {"question": "hello", "answers": ["a"]},
        {"question": "HELLO?!", "answers": ["b"]},
        {"question": "the hello", "answers": ["b"]},
        {"question": "no answer"},
        {"question": "no answer", "answers": [" "]},
        {"answers": ["a"]},
        {"question": "x", "answers": [{"a": 1}]},
        {"question": "  ", "answers": ["a"]},
        [3],
        {"question": "long " * 600, "answers": ["a"]},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"question": "world", "answers": ["a"]},
    ]
    out = tmp_path / "g.jsonl"
    graded = write(folder, out, rows, model=model)
    assert (graded.questions, graded.rows) == (3, 2)
    assert graded.left_out.counts == {
        **{"duplicate": 2, "no_answer": 2, "missing_key": 1, "wrong_type": 1, "empty_content": 1, "not_an_object": 1},
        **{"too_long": 1, "no_assistant": 1},
    }
    assert graded.left_out.first["duplicate"].endswith(":2") and graded.left_out.first["too_long"].endswith(":10")
    again = write(folder, out, rows, model=model)
    assert (again.rows, again.left_out.counts) == (2, graded.left_out.counts)


def test_no_question_at_all_is_an_error_that_says_why(folder, model, tmp_path):
    with pytest.raises(ValueError, match=r"1 are left out, the first: .*:1: no_answer: .*'answers'"):
        write(folder, tmp_path / "g.jsonl", [{"question": "a"}], model=model)


def test_a_model_that_gives_nan_is_refused(folder, tmp_path):
    damaged = parts.teacher_of(folder)
    with torch.no_grad():
        next(damaged.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: its weights are damaged"):
        write(folder, tmp_path / "g.jsonl", model=damaged)
    assert not (tmp_path / "g.jsonl").exists()


def test_law_6_killed_and_started_again_the_file_is_the_same(folder, model, whole, tmp_path):
    out = tmp_path / "g.jsonl"
    code = f"from tests.synth.test_idk import killed; killed({str(folder)!r}, {str(out)!r})"
    run = forks.run(["-c", code], cwd=ROOT)
    assert run.returncode == -9, run.stderr
    assert not out.exists()
    done: list[int] = []
    write(folder, out, model=model, report=done.append)
    assert 0 < sum(done) < len(WORDS)
    assert without_origin(out) == without_origin(whole[0])


def test_law_7_processes_share_the_questions_and_write_the_same_file(folder, whole, tmp_path):
    out = tmp_path / "g.jsonl"
    Path(f"{out}.questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked_rows()))
    told = run_ranks("tests.synth.test_idk:in_process", 2, {"folder": str(folder), "out": str(out)})
    assert without_origin(out) == without_origin(whole[0])
    assert all(each["own"] > 0 for each in told) and sum(each["own"] for each in told) == len(WORDS)
    assert len(WORDS) in [each["rows"] for each in told]


def without_origin(path: Path) -> list[str]:
    """Lines of the file; where the questions lay differs."""
    return [line.replace(str(path.parent), "") for line in path.read_text().splitlines()]


def test_a_file_of_other_settings_or_answers_is_not_gone_on_with(folder, model, tmp_path):
    out = tmp_path / "g.jsonl"
    rows = asked_rows()[:2]
    write(folder, out, rows, model=model)
    for name, value in {
        "samples": 4,
        "temperature": 0.5,
        "top_p": 0.5,
        "seed": 1,
        "system": "s",
        "renderer": "o",
    }.items():
        with pytest.raises(ValueError, match=f"begun with other settings .{name} "):
            write(folder, out, rows, model=model, **{name: value})
    Path(f"{out}.questions.jsonl").write_text(json.dumps({**rows[0], "answers": ["else"]}) + "\n")
    with pytest.raises(ValueError, match=r":1: .* begun with other prompts"):
        write(folder, out, rows, model=model)


def test_a_held_out_file_is_asked_again_with_what_was_known(folder, model, whole, tmp_path):
    rows = [{**row, "decision": "known", "language": "en"} for row in rows_of(whole[0])]
    out = tmp_path / "a.jsonl"
    graded = write(
        folder,
        out,
        [*rows, {"prompt": "x"}],
        model=model,
        read=lambda sources: held_out_reader(),
        samples=1,
        temperature=0.0,
    )
    assert graded.left_out.counts == {"missing_key": 1}
    for row, given in zip(rows_of(out), rows):
        assert row["prompt"] == given["prompt"] and row["decision"] == "known" and row["n"] == 1
        assert row["base"] == {"k": given["k"], "n": 3}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples": 0}, "--samples"),
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"temperature": 0.0}, "--temperature .* several --samples"),
        ({"top_p": 0.0}, "--top-p"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"batch_tokens": 0}, "--batch-tokens"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_its_option(settings, told):
    with pytest.raises(ValueError, match=told):
        Asking(**{**SETTINGS, **settings})
