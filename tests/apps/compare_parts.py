"""Run folders for the tests of ``ptl compare``: synthetic ones, and real ones of ``ptl fit`` with W&B beside."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import forks

ROOT = Path(__file__).resolve().parents[2]
RATES, SEEDS, STEPS = ("3e-3", "1e-2"), 3, 6


def write_run(
    folder: Path,
    *,
    lr: float = 0.1,
    seed: int = 0,
    losses: list[Any] | None = None,
    status: str | None = "finished",
    error: str | None = None,
    hours: float = 2.0,
    devices: int = 4,
    config: dict[str, Any] | None = None,
    summary: dict[str, Any] | None = None,
) -> Path:
    """A run folder with a row of ``val/loss`` a step; without a status it has neither summary nor end."""
    import yaml

    folder.mkdir(parents=True)
    tree = {
        "seed_everything": seed,
        "run": {"dir": str(folder), "resume": "never"},
        "trainer": {"default_root_dir": str(folder), "logger": None, "max_epochs": 1},
        "model": {"class_path": "ptl.objectives.sft.SFT", "init_args": {"optimizer": {"lr": lr, "betas": [0.9, 0.95]}}},
        "data": {"train": [{"path": "rows.jsonl"}], "preparation": {"cache_dir": str(folder / "cache")}},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    values = [1.0, 0.5] if losses is None else losses
    start = 1000.0
    rows = [{"event": "start", "step": 0, "time": start}]
    rows += [{"step": i, "epoch": 0, "time": start + i + 1, "val/loss": value} for i, value in enumerate(values)]
    write_lines(folder / "metrics.jsonl", rows)
    events = [{"event": "start", "attempt": 1, "time": start, "world_size": devices}]
    if status:
        events.append({"event": "end", "attempt": 1, "time": start + 3600 * hours, "status": status})
        told = {"status": status, "error": error, "global_step": len(values), "monitor": "val/loss", "attempts": 1}
        told |= {"wall_seconds_all_attempts": 3600 * hours, "devices": devices}
        told["throughput"] = {"tokens_per_second_per_device": 100.0 + seed, "mfu": None, "peak_memory_gib": 1.5}
        (folder / "summary.json").write_text(json.dumps({**told, **(summary or {})}))
    write_lines(folder / "attempts.jsonl", events)
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Done:
    """How a command ended and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def ptl(*arguments: str | Path, cwd: Path | None = None) -> Done:
    """Runs a ``ptl`` command in this process, as for a terminal of 200 columns."""
    from ptl import cli

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", os.environ.get("PTL_TEST_COLUMNS", "200"))
        if cwd:
            patch.chdir(cwd)
        code = cli.main([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def ptl_process(*arguments: str | Path, **variables: str) -> Done:
    """Runs ``ptl`` in a process of its own with other variables."""
    done = forks.run(["-m", "ptl.cli", *arguments], _environment(variables))
    return Done(done.returncode, done.stdout, done.stderr)


def ptl_fresh(*arguments: str | Path, **variables: str) -> Done:
    """Runs ``ptl`` in a process that has imported nothing, for variables that are read at an import."""
    words = [sys.executable, "-m", "ptl.cli", *map(str, arguments)]
    env = _environment(variables)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def compared(*arguments: str | Path, run: Callable[..., Done] = ptl, **options: Any) -> dict[str, Any]:
    """What ``ptl compare --json`` prints."""
    done = run("compare", *arguments, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def runs_by_name(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in comparison["runs"]}


# ---- real runs ----


def fit_all(folder: str) -> list[int]:
    """Two learning rates times three seeds through the real command, with W&B offline; exit codes."""
    os.environ.update(PTL_CACHE=f"{folder}/cache", WANDB_MODE="offline", WANDB_SILENT="true")
    os.environ.update(WANDB_ERROR_REPORTING="false", WANDB_DIR=folder)
    os.chdir(folder)
    import wandb

    from ptl import cli

    codes = []
    layers = ("base", "objective/sft", "data/chat", "trainer/cpu", "overlay/wandb")
    stack = [word for name in layers for word in ("-c", f"{ROOT}/configs/{name}.yaml")]
    for rate in RATES:
        for seed in range(SEEDS):
            codes.append(
                cli.main(
                    ["fit", *stack, "--run.dir", f"runs/lr{rate}-s{seed}", "--seed_everything", str(seed),
                     "--data.seed", str(seed),
                     "--model.optimizer.lr", rate, "--model.policy.name", f"{folder}/model",
                     "--data.train", f"[{{path: {folder}/rows.jsonl}}]", "--data.val", "null",
                     "--data.val_fraction", "0.2", "--data.max_length", "256", "--data.pack_to", "256",
                     "--data.preparation.num_proc", "1", "--trainer.devices", "1", "--trainer.max_epochs", "-1",
                     "--trainer.max_steps", str(STEPS), "--trainer.log_every_n_steps", "1",
                     "--trainer.accumulate_grad_batches", "1", "--trainer.check_val_every_n_epoch", "null",
                     "--trainer.val_check_interval", "2", "--trainer.enable_progress_bar", "false",
                     "--throughput.warmup", "1"]
                )
            )  # fmt: skip
            wandb.finish()
    return codes


def log_attempts(folder: str) -> None:
    """A run of W&B's own library in two offline attempts: steps 0 to 9, then 6 to 13 after a resume from step 6."""
    import wandb

    for first, last, offset in ((0, 10, 0.0), (6, 14, 100.0)):
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        run = wandb.init(project="p", id="resumed", dir=folder, mode="offline", config={"lr": 0.5}, settings=settings)
        for step in range(first, last):
            loss = float("nan") if step == 13 else step + offset
            run.log({"trainer/global_step": step, "train/loss": loss, "train/reward": 1.0})
        run.finish(exit_code=0 if offset else 1)


def make_real(folder: str) -> list[int]:
    """Everything that needs W&B's library, in one process."""
    codes = fit_all(folder)
    log_attempts(f"{folder}/resumed")
    return codes
