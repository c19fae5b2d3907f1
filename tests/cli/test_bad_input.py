"""A user's mistake is a few words on stderr that name the place, and an exit code; never a traceback."""

from __future__ import annotations

import json
import logging

import pytest

from ptl import cli
from tests.objectives import law

GOOD = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}


def bad_row(**change):
    return json.dumps({**GOOD, **change})


FILES = {
    "broken json": ('{"messages": [', ["rows.jsonl:2", "broken_json"]),
    "not an object": ("[1, 2]", ["rows.jsonl:2", "not_an_object"]),
    "unknown role": (bad_row(messages=[{"role": "robot", "content": "x"}]), ["rows.jsonl:2", "robot"]),
    "null content": (bad_row(messages=[{"role": "user", "content": None}]), ["rows.jsonl:2", "null_content"]),
    "empty conversation": (bad_row(messages=[]), ["rows.jsonl:2", "empty_conversation"]),
    "missing key": ('{"other": "x"}', ["rows.jsonl:2", "messages"]),
    "no assistant": (bad_row(messages=[{"role": "user", "content": "x"}]), ["rows.jsonl:2", "no_assistant"]),
    "content a number": (bad_row(messages=[{"role": "user", "content": 3}]), ["rows.jsonl:2"]),
}
OPTIONS = {
    "unknown trainer key": (["--trainer.max_stepz", "3"], ["max_stepz"]),
    "unknown data key": (["--data.max_lenght", "3"], ["max_lenght"]),
    "unknown policy key": (["--model.policy.adaptor", "3"], ["adaptor"]),
    "unknown lora key": (["--model.policy.adapter.rankk", "3"], ["rankk", "rank"]),
    "wrong type": (["--data.max_length", "many"], ["data.max_length", "many"]),
    "unknown objective": (["--model.class_path", "ptl.objectives.sft.SFTT"], ["SFTT", "SFT"]),
    "no such model": (["--model.policy.name", "/nowhere/model"], ["/nowhere/model"]),
    "no such data": (["--data.train", "[{path: /nowhere/rows.jsonl}]"], ["/nowhere/rows.jsonl"]),
    "rank below one": (["--model.policy.adapter.rank", "0"], ["rank", "0"]),
    "too long a row": (["--data.max_length", "8"], ["max_length", "8"]),
    "pack below length": (["--data.pack_to", "16"], ["pack_to", "16"]),
    "padded packs": (["--data.pack_to", "512", "--data.layout", "padded"], ["pack_to", "layout"]),
    "quantised without adapter": (["--model.policy.quantize", "nf4"], ["adapter"]),
    "smoothing above one": (["--model.label_smoothing", "1.5"], ["label_smoothing", "1.5"]),
    "both val and fraction": (["--data.val_fraction", "0.5", "--data.val", "[{path: x.jsonl}]"], ["val_fraction"]),
    "no such config file": (["-c", "/nowhere/run.yaml"], ["/nowhere/run.yaml"]),
}


@pytest.fixture(autouse=True)
def quiet_logging(monkeypatch):
    """Libraries keep the stream of the test that first loaded them, which is closed in the next."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return law.make_folder(tmp_path_factory.mktemp("bad"))


def arguments(folder, run, *more):
    return [
        "fit", "--model.class_path", "ptl.objectives.sft.SFT", "--model.policy.name", f"{folder}/model",
        "--data.train", f"[{{path: {folder}/rows.jsonl}}]", "--data.preparation.cache_dir", f"{folder}/cache",
        "--data.preparation.num_proc", "1", "--data.max_length", "256", "--trainer.accelerator", "cpu",
        "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false", "--run.dir", str(run), *more,
    ]  # fmt: skip


def check(code, err, expected):
    last = [line for line in err.splitlines() if "error" in line]
    assert code == 2 and last, err
    assert "Traceback" not in err
    told = err[err.index(last[0]) :]
    for words in expected:
        assert words in told, told


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_one_clear_message(case, folder, tmp_path, capsys):
    more, expected = OPTIONS[case]
    code = cli.main(arguments(folder, tmp_path / "run", *more))
    check(code, capsys.readouterr().err, expected)


@pytest.mark.parametrize("case", FILES)
def test_a_bad_row_is_named_by_file_line_and_reason(case, folder, tmp_path, capsys):
    row, expected = FILES[case]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(GOOD), row, json.dumps(GOOD)]) + "\n")
    code = cli.main(arguments(folder, tmp_path / "run", "--data.train", f"[{{path: {tmp_path}/rows.jsonl}}]"))
    check(code, capsys.readouterr().err, [*expected, "max_bad_fraction"])


def test_a_file_that_is_not_utf8_is_named(folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"messages": "\xff\xfe"}\n')
    code = cli.main(arguments(folder, tmp_path / "run", "--data.train", f"[{{path: {tmp_path}/rows.jsonl}}]"))
    check(code, capsys.readouterr().err, ["rows.jsonl:2", "wrong_encoding"])


def test_a_run_folder_with_checkpoints_is_not_written_over(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(folder, run)) == 0
    capsys.readouterr()
    code = cli.main(arguments(folder, run))
    check(code, capsys.readouterr().err, ["--run.resume auto", str(run)])
    assert cli.main(arguments(folder, run, "--run.resume", "auto", "--trainer.max_steps", "2")) == 0


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["fitt"]) == 2
    assert "did you mean 'fit'" in capsys.readouterr().err


def test_secrets_reach_no_file_of_the_run(folder, tmp_path, monkeypatch):
    secret = "hf_" + "q" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    run = tmp_path / "run"
    assert cli.main(arguments(folder, run, "--data.train", f"[{{path: {folder}/rows.jsonl, name: {secret}}}]")) == 0
    written = [p for p in run.rglob("*") if p.is_file()]
    assert (run / "config.yaml") in written
    assert not [p for p in written if secret.encode() in p.read_bytes()]
