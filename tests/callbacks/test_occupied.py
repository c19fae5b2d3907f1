"""Two commands in one run folder: the second is refused in one line, and a lock never outlives its process."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ptl import cli
from ptl.callbacks.occupied import OCCUPIED_FILE, occupy
from tests.objectives import law

HOLD = (
    "import sys; from ptl.callbacks.occupied import occupy; kept = occupy(sys.argv[1]); print('has it', flush=True); "
)


@contextmanager
def held(folder, then="sys.stdin.read()"):
    """Another process that has taken the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "has it\n"
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)
        process.stdin.close()
        process.stdout.close()


def test_a_folder_is_taken_once(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with held(tmp_path / "run") as process:
        with pytest.raises(ValueError, match=rf"in use by process {process.pid} on .*pass another --run.dir"):
            occupy(tmp_path / "run")
        occupy(tmp_path / "other").close()
        process.kill()  # as a node's out-of-memory killer does
        process.wait(timeout=30)
        occupy(tmp_path / "run").close()


def test_a_loader_process_that_lives_on_does_not_keep_the_folder(tmp_path):
    fork = (
        "import os, time\nif os.fork() == 0:\n    sys.stdout.write('lives on\\n'); sys.stdout.flush(); time.sleep(20)"
    )
    hold = HOLD.replace("; print", "\nprint").replace("; ", "\n") + fork + "\nos._exit(0)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert [process.stdout.readline(), process.stdout.readline()] == ["has it\n", "lives on\n"]
        process.wait(timeout=30)
        occupy(tmp_path).close()


def test_the_next_attempt_of_a_job_takes_the_folder_from_the_last(tmp_path, monkeypatch):
    """A lock server may not have heard yet that a node is gone."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with held(tmp_path) as process:
        assert json.loads((tmp_path / OCCUPIED_FILE).read_text())["pid"] == process.pid
        with pytest.raises(ValueError, match="in use"):  # another step of the same attempt, which lives
            occupy(tmp_path)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        file = occupy(tmp_path)
        assert file is not None and json.loads((tmp_path / OCCUPIED_FILE).read_text())["job"] == "17"
        file.close()
        monkeypatch.setenv("SLURM_JOB_ID", "18")
    with held(tmp_path), pytest.raises(ValueError, match="in use"):
        monkeypatch.setenv("SLURM_JOB_ID", "19")
        occupy(tmp_path)


def test_a_folder_that_cannot_be_written_is_left_to_the_run(tmp_path):
    (tmp_path / "run").write_text("a file")
    assert occupy(tmp_path / "run") is None


def test_a_second_fit_is_refused_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    law.make_folder(tmp_path)
    run = tmp_path / "run"
    command = [
        *("fit", "-c", "configs/objective/sft.yaml", "--model.policy.name", f"{tmp_path}/model"),
        *("--data.train", f"[{{path: {tmp_path}/rows.jsonl}}]", "--run.dir", str(run), "--run.resume", "auto"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", "1"),
        *("--trainer.enable_progress_bar", "false", "--data.max_length", "256"),
    ]
    with held(run):
        before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
        assert cli.main(command) == 2
        assert "is in use by process" in capsys.readouterr().err
        assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert cli.main(command) == 0
    assert (run / "metrics.jsonl").exists()
