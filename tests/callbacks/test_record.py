"""The run folder: what is in it, what is never in it, and how it ends."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import WandbLogger

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.facts import MAX_DIFF_BYTES, git_state, versions
from ptl.callbacks.jsonl import JsonlLogger, read_metrics, read_rows
from ptl.callbacks.record import RunRecord, attempt_times, run_folder
from ptl.callbacks.saved import latest_checkpoint
from ptl.callbacks.throughput import Throughput
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.callbacks.real import chat, make_inputs, sft
from tests.callbacks.test_redact import HF

BATCHES = [packed([8, 8], trained=4, seed=i) for i in range(6)]


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def run(folder: Path, *more, **options) -> L.Trainer:
    callbacks = [RunRecord(folder), Throughput(warmup=1, every_n_steps=1), *more]
    fit = trainer(folder, callbacks, **options)
    fit.fit(Toy(), loader(BATCHES), loader(BATCHES[:2]))
    return fit


def test_the_run_folder_says_what_was_run_and_how_it_ended(tmp_path):
    run(tmp_path, Checkpoint(), Checkpoint(monitor="val/loss"), val_check_interval=3)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"command.txt", "versions.json", "environment.json", "git.json", "model.json", "summary.json"} <= names
    assert {"attempts.jsonl", "metrics.jsonl", "checkpoints"} <= names
    assert (tmp_path / "command.txt").read_text() == shlex.join([sys.executable, *sys.argv]) + "\n"
    found = read(tmp_path, "versions.json")
    assert found["packages"]["lightning"].startswith("2.") and found["torch"] and found["python"].startswith("3.")
    assert read(tmp_path, "environment.json")["world_size"] == 1
    counts = read(tmp_path, "model.json")
    assert counts["parameters"] == counts["trainable_parameters"] == sum(p.numel() for p in Toy().parameters())

    summary = read(tmp_path, "summary.json")
    assert (summary["status"], summary["error"], summary["global_step"], summary["attempts"]) == (
        "finished",
        None,
        6,
        1,
    )
    losses = [row["val/loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "val/loss" in row]
    assert summary["final"] == {"value": pytest.approx(losses[-1]), "step": 6}
    assert summary["best"]["value"] == pytest.approx(min(losses))
    assert summary["throughput"]["measured_steps"] == 5 and summary["throughput"]["tokens_per_second"] > 0
    assert summary["throughput"]["tokens_per_second_deviation"] > 0 and summary["throughput"]["mfu"] is None
    assert 0 < summary["wall_seconds"] <= summary["wall_seconds_all_attempts"] + 1
    assert summary["last_checkpoint"] == "checkpoints/step=00000006.ckpt"
    assert summary["best_checkpoint"].startswith("checkpoints/best-step=")


def test_metrics_are_one_object_a_line(tmp_path):
    run(tmp_path)
    rows = read_rows(tmp_path / "metrics.jsonl")
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert all(row["time"] > 1.7e9 for row in rows)
    # What different callbacks say of one step carries the same number.
    assert [row["step"] for row in rows if "throughput/tokens_per_second" in row] == [1, 2, 3, 4, 5]


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path):
    run(tmp_path, Checkpoint(every_n_train_steps=2), max_steps=3)
    torn = tmp_path / "metrics.jsonl"
    with open(torn, "a") as file:  # the killed attempt had gone on to step 5 and was torn in a line
        file.write('{"step": 4, "epoch": 0, "time": 1.0, "train/loss": 99.0}\n{"step": 5, "train/lo')
    fit = trainer(tmp_path, [RunRecord(tmp_path), Checkpoint(every_n_train_steps=2)], max_steps=6)
    fit.fit(Toy(), loader(BATCHES[3:]), ckpt_path=latest_checkpoint(tmp_path))
    rows = [row for row in read_metrics(torn) if "train/loss" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert 99.0 not in [row["train/loss"] for row in rows]
    assert any(row.get("train/loss") == 99.0 for row in read_rows(torn))  # kept, and superseded
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 2
    assert read(tmp_path, "summary.json")["attempts"] == 2


def test_the_best_value_survives_a_resume(tmp_path):
    run(tmp_path, Checkpoint(), max_steps=2, val_check_interval=1)
    best = read(tmp_path, "summary.json")["best"]
    fit = trainer(tmp_path, [RunRecord(tmp_path), Checkpoint()], max_steps=3)
    fit.fit(Toy(lr=1e9), loader(BATCHES), ckpt_path=latest_checkpoint(tmp_path))
    assert read(tmp_path, "summary.json")["best"] == best


def test_a_failure_is_in_the_summary(tmp_path):
    class Break(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2:
                raise RuntimeError(f"no access with {HF}")

    with pytest.raises(RuntimeError):
        run(tmp_path, Break())
    summary = read(tmp_path, "summary.json")
    assert summary["status"] == "failed" and summary["error"].startswith("RuntimeError: no access with [red")
    assert summary["global_step"] == 2
    assert [row["event"] for row in read_rows(tmp_path / "attempts.jsonl")] == ["start", "end"]


def test_wall_time_counts_a_killed_attempt_up_to_its_last_row(tmp_path):
    attempts = [
        {"event": "start", "attempt": 1, "time": 100.0, "world_size": 8},
        {"event": "start", "attempt": 2, "time": 500.0, "world_size": 2},
        {"event": "end", "attempt": 2, "time": 560.0},
        {"event": "start", "attempt": 3, "time": 600.0},
    ]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in attempts))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 130.0}\n{"step": 2, "time": 140.0}\n{"step')
    assert attempt_times(tmp_path) == [(40, 8), (60, 2), (0, 1)]


def test_secrets_never_reach_the_run_folder(tmp_path, monkeypatch):
    """In the command, the environment, the changes to the code, an error, a metric."""
    repo = tmp_path / "code"
    repo.mkdir()
    git(repo, "init", "-q")
    (repo / "file.py").write_text("x = 1\n")
    git(repo, "add", ".")
    git(repo, "commit", "-q", "-m", "x")
    (repo / "file.py").write_text(f"x = 1\nTOKEN = '{HF}'\npassword = 'open-sesame-42'\nmine = 'a-secret-of-mine'\n")
    monkeypatch.chdir(repo)
    monkeypatch.setenv("MY_API_KEY", "a-secret-of-mine")
    monkeypatch.setenv("SLURM_JOB_NAME", "job a-secret-of-mine")
    monkeypatch.setenv("OTHER_TOKEN", "never-asked-for")
    monkeypatch.setattr("sys.argv", ["ptl", "fit", "--hub.token", HF, "--url", "https://me:pw-pw-pw@host/x"])
    folder = tmp_path / "run"

    class Leak(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.logger.log_metrics({"note": f"used {HF}"}, step=trainer.global_step)
            if trainer.global_step == 2:
                raise ValueError("cannot read https://me:pw-pw-pw@host/x")

    with pytest.raises(ValueError, match="cannot read"):
        run(folder, Leak(), Checkpoint(every_n_train_steps=1))
    written = [p for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 8 and "diff --git" in (folder / "git.diff").read_text()
    for path in written:
        content = path.read_bytes()
        for secret in (HF, "open-sesame-42", "a-secret-of-mine", "never-asked-for", "pw-pw-pw"):
            assert secret.encode() not in content, (path.name, secret)
    assert "ptl fit --hub.token [redacted]" in (folder / "command.txt").read_text().replace("'", "")


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, timeout=60, capture_output=True)


def test_git_state(tmp_path):
    assert git_state(tmp_path) == (None, "")
    git(tmp_path, "init", "-q", "-b", "trunk")
    (tmp_path / "a").write_text("1\n")
    state, diff = git_state(tmp_path)
    assert state is not None and state["commit"] is None and state["dirty"] and state["untracked"] == ["a"]
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    state, diff = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and (state["branch"], state["dirty"]) == ("trunk", False)
    (tmp_path / "a").write_text("2\n" * MAX_DIFF_BYTES)
    (tmp_path / "b").write_text("new")
    state, diff = git_state(tmp_path)
    assert state is not None and state["dirty"] and state["untracked"] == ["b"]
    assert "+2\n" in diff and len(diff) < MAX_DIFF_BYTES + 100 and "[cut:" in diff


def test_versions_name_every_package():
    assert {"torch", "lightning", "transformers"} <= set(versions()["packages"])


def test_numbers_that_json_lacks_and_values_that_are_no_numbers(tmp_path):
    logger = JsonlLogger(tmp_path)
    logger.log_metrics({"a": float("nan"), "b": float("-inf"), "table": object(), "ok": 1}, step=3)
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["a"], row["b"], row["ok"], row["step"]) == ("nan", "-inf", 1, 3) and "table" not in row
    assert float(row["a"]) != float(row["a"])


def test_nothing_is_written_outside_of_fit(tmp_path):
    fit = trainer(tmp_path, [RunRecord(tmp_path / "run")])
    fit.validate(Toy(), loader(BATCHES[:1]), verbose=False)
    assert not (tmp_path / "run").exists()
    assert run_folder(fit) == tmp_path / "run"


def test_wandb_gets_the_summary(tmp_path):
    logger = WandbLogger(project="test", save_dir=str(tmp_path), offline=True)
    fit = trainer(tmp_path, [RunRecord(tmp_path), Throughput(warmup=0)], logger=[logger], max_steps=2)
    fit.fit(Toy(), loader(BATCHES), loader(BATCHES[:1]))
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["run/status"] == "finished" and summary["run/throughput/tokens_per_second"] > 0
    assert summary["throughput/tokens_per_second"] > 0


def test_what_the_data_holds_is_kept(tmp_path):
    model, data = make_inputs(tmp_path / "inputs")
    fit = trainer(tmp_path / "run", [RunRecord(tmp_path / "run")], max_steps=1)
    fit.fit(sft(model), chat(model, data))
    audit = read(tmp_path / "run", "audit.json")["train"]
    assert "12" in json.dumps(audit) and "chat.jsonl" in json.dumps(audit)
    assert read(tmp_path / "run", "data.json")["train"]["units"] == 12


def test_bad_mode():
    with pytest.raises(ValueError, match="mode must be min or max"):
        RunRecord("x", mode="best")  # pyright: ignore[reportArgumentType]
