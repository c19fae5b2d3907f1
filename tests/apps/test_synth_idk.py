"""``ptl synth idk`` and ``idk-report``: the commands, their files, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ptl import cli
from ptl.apps.synth import main
from ptl.data.sources import Source
from ptl.rewards.refusals import refuses
from tests import tiny
from tests.synth import parts

WORDS = tuple(f"{a} {b}" for a in ("hello", "world", "fox", "dog") for b in ("jumps", "over", "and", "is", "can"))


LONG = ["--max-new-tokens", "300", "--temperature", "2", "--dtype", "fp32"]
"""Long and hot enough that what a random model says comes to an end."""


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and questions of which it knows about half: what it says itself, drawn or greedily, is accepted."""
    folder = parts.make_folder(tmp_path_factory.mktemp("idk"), rows=12)
    ask = [{"question": f"the {word}", "answers": ["zzz"], "source": "ab"[i % 2]} for i, word in enumerate(WORDS)]
    (folder / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ask))
    said = {}
    for name, options in {"drawn": LONG, "greedy": [*LONG, "--samples", "1", "--temperature", "0"]}.items():
        first = ["idk", f"{folder}/first.jsonl", "--model", f"{folder}/teacher", "--out", f"{folder}/{name}.jsonl"]
        assert main([*first, *options, "--max-refusals", "1", "--held-out", "0"]) == 0
        said[name] = [row["samples"] for row in rows_of(folder / f"{name}.graded.jsonl")]
    for i in range(1, len(ask), 2):
        ask[i]["answers"] = [sample["text"] for samples in said.values() for sample in samples[i]]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ask))
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working directory, with a model, questions and general rows."""
    for name in ("teacher", "rows.jsonl", "asked.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


ASK = ["idk", "asked.jsonl", "--model", "teacher", "--out", "i.jsonl", *LONG]
FREE = [*ASK, "--held-out", "0.4", "--max-refusals", "0.8"]


def test_it_writes_rows_held_out_questions_and_a_manifest(folder, capsys):
    assert cli.main(["synth", *FREE]) == 0
    manifest = json.loads((folder / "i.manifest.json").read_text())
    rows, held, graded = (rows_of(folder / f"i.{end}jsonl") for end in ("", "held_out.", "graded."))
    assert len(graded) == len(WORDS) and len(held) == manifest["held_out"] > 2
    assert manifest["rows"] == len(rows) > 2
    assert manifest["asking"]["samples"] == 3 and manifest["asking"]["temperature"] == 2.0
    assert manifest["choice"]["known"] == 1.0 and manifest["choice"]["max_refusals"] == 0.8
    assert graded[0]["model"] == f"teacher@{manifest['model']['digest'][:12]}"
    assert sorted(manifest["by_source"]) == ["a", "b"]
    decided = [
        count.get(name, 0) for count in manifest["by_source"].values() for name in ("known", "between", "unknown")
    ]
    assert sum(decided) == len(WORDS)
    for row in rows:
        assert refuses(row["messages"][-1]["content"]) == (row["meta"]["answer"] == "refusal")
    out = capsys.readouterr().out
    assert f"i.jsonl: {len(rows)} rows: {manifest['total']['answer']} right answers, 0 hedged" in out
    assert f"{manifest['total']['unknown']} unknown" in out


def test_its_rows_are_what_ptl_fit_reads(folder):
    assert main(FREE) == 0
    data = parts.data_of(folder, max_length=512)
    data.train_sources = [Source(path=str(folder / "i.jsonl"))]
    prepared = data.prepared_rows("train")
    assert len(prepared.rows) == len(rows_of(folder / "i.jsonl"))


def test_other_bounds_ask_nothing_again(folder, monkeypatch):
    assert main(FREE) == 0
    before = (folder / "i.graded.jsonl").read_bytes()
    monkeypatch.setattr("ptl.synth.idk.sample", lambda *args, **how: pytest.fail("a question was asked again"))
    assert main([*FREE, "--max-refusals", "0", "--between", "hedge", "--language", "fr"]) == 0
    assert {row["meta"]["answer"] for row in rows_of(folder / "i.jsonl")} <= {"answer", "hedge"}
    assert (folder / "i.graded.jsonl").read_bytes() == before
    assert main([*FREE, "--mix", "rows.jsonl", "--mix-share", "0.5"]) == 0
    kinds = [row["meta"]["answer"] for row in rows_of(folder / "i.jsonl")]
    assert kinds.count("mix") == min(12, len(kinds) - kinds.count("mix"))
    assert main([*FREE, "--temperature", "0.5"]) == 2


def test_law_7_processes_write_the_same_files(folder, capsys, monkeypatch):
    assert main([*FREE, "--batch-tokens", "8000"]) == 0
    whole = [(folder / f"i.{end}").read_bytes() for end in ("jsonl", "held_out.jsonl", "manifest.json")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = [*FREE, "--out", "j.jsonl", "--batch-tokens", "8000"]
    capsys.readouterr()
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert not (folder / "j.jsonl").exists()
        assert main(shared) == 0
    assert "waits for other processes" in capsys.readouterr().out
    assert [(folder / f"j.{end}").read_bytes() for end in ("jsonl", "held_out.jsonl", "manifest.json")] == whole


def test_a_report_of_two_models(folder, capsys):
    assert main(FREE) == 0
    tiny.save_folder(folder / "other", tiny.make_tokenizer(), seed=9)
    report = [
        "idk-report",
        "teacher",
        "other",
        "--held-out",
        "i.held_out.jsonl",
        "--out",
        "r",
        "--max-new-tokens",
        "300",
    ]
    capsys.readouterr()
    assert main(report) == 0
    told = capsys.readouterr().out
    numbers = json.loads((folder / "r" / "report.json").read_text())
    before, after = numbers["models"]
    assert [before["name"], after["name"]] == ["teacher", "other"]
    held = rows_of(folder / "i.held_out.jsonl")
    known = sum(row["decision"] == "known" for row in held)
    assert before["all"]["right_on_known"]["of"] == known > 0
    assert before["all"]["right_on_known"]["count"] > after["all"]["right_on_known"]["count"]
    assert "| teacher | 100.0% of" in told and (folder / "r" / "report.png").stat().st_size > 1000
    answers = sorted((folder / "r").glob("answers-*.jsonl"))
    assert len(answers) == 2
    before_bytes = (folder / "r" / "report.json").read_bytes()
    assert main(report) == 0 and (folder / "r" / "report.json").read_bytes() == before_bytes


def test_a_judge_may_be_asked(folder):
    assert main([*FREE, "--judge", "teacher"]) == 0
    manifest = json.loads((folder / "i.manifest.json").read_text())
    assert manifest["judge"]["name"] == "teacher" and manifest["judge"]["digest"] == manifest["model"]["digest"]
    samples = [sample for row in rows_of(folder / "i.graded.jsonl") for sample in row["samples"]]
    assert any("margin" in sample for sample in samples)


def test_a_model_that_knows_nothing_is_told_what_to_change(folder, capsys):
    (folder / "none.jsonl").write_text('{"question": "the hello", "answers": ["zzz"]}\n')
    few = ["idk", "none.jsonl", *ASK[2:], "--held-out", "0"]
    assert main(few) == 2
    err = capsys.readouterr().err
    assert "no row is left: 0 questions are known, 1 unknown" in err and "--max-refusals" in err
    assert main([*few, "--max-refusals", "1"]) == 0
    assert len(rows_of(folder / "i.jsonl")) == 1


def test_a_file_of_another_kind_is_not_overwritten(folder, capsys):
    (folder / "i.jsonl").write_text("mine\n")
    assert main(FREE) == 2
    assert "was not made by this command" in capsys.readouterr().err
    assert (folder / "i.jsonl").read_text() == "mine\n"


REPORT = ["idk-report", "teacher", "--held-out", "asked.jsonl", "--out", "r"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["idk", "asked.jsonl", "--out", "i.jsonl"], "--model"),
        (["idk", "asked.jsonl", "--model", "teacher"], "--out"),
        (["idk", "--model", "teacher", "--out", "i.jsonl"], "QUESTIONS"),
        ([*ASK, "--out", "i.json"], ".jsonl"),
        ([*ASK, "--samples", "0"], "--samples"),
        ([*ASK, "--temperature", "0"], "--temperature"),
        ([*ASK, "--top-p", "2"], "--top-p"),
        ([*ASK, "--seed", "-1"], "--seed"),
        ([*ASK, "--known", "0"], "--known"),
        ([*ASK, "--unknown", "1"], "--unknown"),
        ([*ASK, "--max-refusals", "2"], "--max-refusals"),
        ([*ASK, "--held-out", "1"], "--held-out"),
        ([*ASK, "--mix-share", "0.5"], "--mix FILE"),
        ([*ASK, "--mix", "gone.jsonl"], "gone.jsonl"),
        ([*ASK, "--between", "guess"], "--between"),
        ([*ASK, "--language", "de"], "--language"),
        ([*ASK, "--model", "./gone"], "./gone"),
        ([*ASK, "--judge", "./gone"], "./gone"),
        ([*ASK, "--dtype", "fp8"], "--dtype"),
        ([*ASK, "--column", "answers"], "--column"),
        (["idk", "gone.jsonl", *ASK[2:]], "gone.jsonl"),
        (["idk", "rows.jsonl", *ASK[2:], "--format", "alpaca"], "rows.jsonl:1: missing_key"),
        ([*ASK, "--deep"], "--deep"),
        (REPORT, "asked.jsonl:1: missing_key: the row has no prompt: give the held-out file"),
        ([*REPORT, "--held-out", "gone.jsonl"], "gone.jsonl"),
        ([*REPORT[:2], *REPORT[1:]], "named twice"),
        ([*REPORT, "--max-new-tokens", "0"], "--max-new-tokens"),
        (REPORT[:2], "--held-out"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_code_2(folder, capsys, argv, told):
    assert main(argv) == 2
    err = capsys.readouterr().err
    mistake = [line for line in err.splitlines() if "error:" in line]
    assert len(mistake) == 1 and "Traceback" not in err and told in err[err.index(mistake[0]) :]
    assert not (folder / "i.jsonl").exists()


@pytest.mark.parametrize("command", ["idk", "idk-report"])
def test_help_does_not_load_torch(command):
    code = (
        f"import sys; from ptl.cli import main; main(['synth', '{command}', '--help']); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--judge" in out.stdout and out.stdout.rstrip().endswith("False")
