"""``ptl synth candidates``: the command, what it tells, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from ptl import cli
from ptl.apps.synth import main
from ptl.apps.synth_candidates import model_digest
from ptl.models.names import Found, base_spec
from tests import tiny
from tests.synth import parts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return parts.make_folder(tmp_path_factory.mktemp("candidates"), rows=5)


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """The working directory, with a model and rows."""
    for name in ("teacher", "rows.jsonl"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "asked.csv").write_text("id,ask\n1,hello\n2,world\n")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


ASK = ["candidates", "rows.jsonl", "--model", "teacher", "--out", "c.jsonl", "--max-new-tokens", "6"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_writes_a_row_a_prompt_and_says_so(folder, capsys):
    assert cli.main(["synth", *ASK, "--k", "3", "--keep-unfinished", "--temperature", "1.5", "--top-p", "0.9"]) == 0
    rows = rows_of(folder / "c.jsonl")
    answers = [completion for row in rows for completion in row["completions"]]
    out = capsys.readouterr().out
    assert f"c.jsonl: {len(answers)} answers to 5 prompts; prompts left out: none; answers dropped: " in out
    for answer in answers:
        meta = answer["meta"]
        assert (meta["temperature"], meta["top_p"], meta["tokens"]) == (1.5, 0.9, 6) or meta["finished"]
        assert meta["model"].startswith("teacher@")
    settings = json.loads((folder / "c.jsonl.settings.json").read_text())
    assert settings["model"].startswith(answers[0]["meta"]["model"].partition("@")[2]) and settings["k"] == 3
    before = (folder / "c.jsonl").read_bytes()
    assert main([*ASK, "--k", "3", "--keep-unfinished", "--temperature", "1.5", "--top-p", "0.9"]) == 0
    assert (folder / "c.jsonl").read_bytes() == before
    assert main([*ASK, "--k", "4", "--keep-unfinished", "--temperature", "1.5", "--top-p", "0.9"]) == 2
    assert "k 3 against 4" in capsys.readouterr().err


def test_options_of_a_source_and_a_system_turn(folder):
    more = ["--column", "prompt=ask", "--limit", "1", "--system", "short", "--keep-unfinished"]
    assert main(["candidates", "asked.csv", *ASK[2:], *more]) == 0
    assert [row["prompt"] for row in rows_of(folder / "c.jsonl")] == [
        [{"role": "system", "content": "short"}, {"role": "user", "content": "hello"}]
    ]


def test_a_model_without_a_template_is_given_one(folder):
    tiny.save_folder(folder / "bare", tiny.make_tokenizer(template=None))
    assert main([*ASK, "--model", "bare", "--template", "chatml", "--keep-unfinished"]) == 0
    assert len(rows_of(folder / "c.jsonl")) == 5


def test_processes_wait_for_each_other(folder, capsys, monkeypatch):
    more = ["--keep-unfinished", "--batch-tokens", "100"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert not (folder / "c.jsonl").exists()
        assert main([*ASK, *more]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "waits for other processes" in out[0] and "answers to 5 prompts" in out[1]


def test_a_run_without_one_usable_row_fails_and_says_what_to_change(folder, capsys):
    assert main([*ASK[:-1], "1"]) == 2
    out, err = capsys.readouterr()
    assert "0 answers to 0 prompts; prompts left out: 5 too_few_answers (first rows.jsonl:1)" in out
    assert "--keep-unfinished" in err


def test_an_adapter_is_another_model(folder, tmp_path):
    base = Found("teacher", False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "teacher", "lora_alpha": 8}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    found = Found(str(adapter), True)
    seen = [model_digest(base, base_spec(base)), model_digest(found, base_spec(found))]
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "teacher", "lora_alpha": 9}))
    seen.append(model_digest(found, base_spec(found)))
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    seen.append(model_digest(found, base_spec(found)))
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["candidates", "rows.jsonl", "--out", "c.jsonl"], "--model"),
        (["candidates", "rows.jsonl", "--model", "teacher"], "--out"),
        (["candidates", "--model", "teacher", "--out", "c.jsonl"], "PROMPTS"),
        ([*ASK, "--out", "c.json"], ".jsonl"),
        ([*ASK, "--k", "1"], "--k"),
        ([*ASK, "--temperature", "0"], "--temperature"),
        ([*ASK, "--top-p", "2"], "--top-p"),
        ([*ASK, "--seed", "-1"], "--seed"),
        ([*ASK, "--batch-tokens", "0"], "--batch-tokens"),
        ([*ASK, "--max-new-tokens", "0"], "--max-new-tokens"),
        ([*ASK, "--model", "./gone"], "./gone"),
        ([*ASK, "--format", "chat"], "format"),
        ([*ASK, "--format", "text"], "no row has a prompt (5 are left out, the first: rows.jsonl:1: missing_key"),
        ([*ASK, "--column", "prompt"], "--column"),
        ([*ASK, "--deep"], "--deep"),
        (["candidates", "gone.jsonl", *ASK[2:]], "gone.jsonl"),
        ([*ASK, "--model", "bare"], "set template"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_code_2(folder, capsys, argv, told):
    tiny.save_folder(folder / "bare", tiny.make_tokenizer(template=None))
    assert main(argv) == 2
    err = capsys.readouterr().err
    mistake = [line for line in err.splitlines() if "error:" in line]
    assert len(mistake) == 1 and "Traceback" not in err and told in err[err.index(mistake[0]) :]
    assert not (folder / "c.jsonl").exists()


def test_help_is_quick_and_does_not_load_torch():
    code = (
        "import sys; from ptl.cli import main; main(['synth', 'candidates', '--help']); print('torch' in sys.modules)"
    )
    began = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert time.monotonic() - began < 1.0
    assert "--top-p" in out.stdout and out.stdout.rstrip().endswith("False")
