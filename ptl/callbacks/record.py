"""The run folder: what was run, on what, from what data, and how it ended.

::

    RUN/command.txt      one line an attempt          RUN/git.json, git.diff     code, with uncommitted changes
    RUN/versions.json    Python, CUDA, packages       RUN/environment.json       host, devices, ranks, scheduler ids
    RUN/model.json       parameters                   RUN/audit.json, data.json  what the data holds, and its digests
    RUN/run.json         its id, also W&B's           RUN/deepspeed.json         DeepSpeed's config as its engine got it
    RUN/attempts.jsonl   starts and ends              RUN/metrics.jsonl          one row a log call (JsonlLogger)
    RUN/summary.json     the result                   RUN/checkpoints, RUN/export, RUN/samples.jsonl
    RUN/pass_rates.jsonl rated prompts (PassRates)

The command line writes ``config.yaml`` beside them. Rank 0 alone writes, each file whole or not at all, without
secrets. A W&B logger is told the same.
"""

from __future__ import annotations

import json
import math
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from ptl.callbacks.exit_codes import PreemptedError
from ptl.callbacks.facts import command_line, environment, git_state, versions
from ptl.callbacks.jsonl import METRICS_FILE, JsonlLogger, read_rows
from ptl.callbacks.redact import redact, redact_tree
from ptl.callbacks.run_identity import make_run_id
from ptl.callbacks.shape import parameter_counts
from ptl.callbacks.throughput import Throughput
from ptl.callbacks.wandb_run import WandbRun, tell
from ptl.data.durable import append_line, write_text
from ptl.data.fingerprints import template_digest

ATTEMPTS_FILE = "attempts.jsonl"
SUMMARY_FILE = "summary.json"
MAIN_PACKAGES = ("lightning", "transformers", "deepspeed", "peft", "datasets", "bitsandbytes", "vllm", "wandb", "numpy")
"""Packages whose versions a table of runs can show; ``versions.json`` has all."""


class RunRecord(L.Callback):
    """Writes the run folder's account of a fit, from its command to its summary.

    Arguments:
        run_dir: the run folder; made if absent. A resumed run goes on in the same one.
        monitor: name of the validation metric whose best and last values are the result.
        mode: whether the lower (``min``) or the higher (``max``) value of it is the better.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], *, monitor: str = "val/loss", mode: Literal["min", "max"] = "min"
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"RunRecord.mode must be min or max, got {mode!r}")
        self.run_dir = Path(run_dir)
        self.monitor = monitor
        self.mode: Literal["min", "max"] = mode
        self._best: dict[str, float | int] | None = None
        self._last: dict[str, float | int] | None = None
        self._attempt = 0
        self._started = time.time()

    # ---- hooks ----

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        make_run_id(self.run_dir)
        self._started = time.time()
        attempts = self.run_dir / ATTEMPTS_FILE
        self._attempt = 1 + sum(row.get("event") == "start" for row in _rows(attempts))
        command = command_line()
        append_line(self.run_dir / "command.txt", command)
        state, diff = git_state(Path.cwd())
        self._write("git.json", state)
        if diff:
            write_text(self.run_dir / "git.diff", diff)
        found = versions()
        self._write("versions.json", found)
        facts = environment(trainer)
        self._write("environment.json", facts)
        start = {
            "event": "start",
            "attempt": self._attempt,
            "time": self._started,
            "date": datetime.fromtimestamp(self._started, tz=UTC).isoformat(timespec="seconds"),
            "host": facts["host"],
            "world_size": facts["world_size"],
            "commit": (state or {}).get("commit"),
            "variables": facts["variables"],
        }
        append_line(attempts, json.dumps(redact_tree(start)))
        told = {"command": command, "git": state, "versions": _main_versions(found), "environment": facts}
        told["attempts"] = [row for row in _rows(attempts) if row.get("event") == "start"]
        files = [self.run_dir / name for name in ("versions.json", *(("git.diff",) if diff else ()))]
        for logger in _wandb_runs(trainer):
            logger.watch_result(self.monitor, self.mode)
            logger.describe(_plain(told), files)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                logger.mark_start(trainer.global_step)
        total, trainable = parameter_counts(getattr(pl_module, "policy", pl_module))
        told: dict[str, Any] = {"model": {"parameters": total, "trainable_parameters": trainable}}
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "audits"):
            self._write("audit.json", {name: audit.as_dict() for name, audit in data.audits.items()})
            told["data"] = {**data.summary(), **_digests(data)}
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            told["deepspeed"] = trainer.strategy.config
        for name, facts in told.items():
            self._write(f"{name}.json", facts)
        for logger in _wandb_runs(trainer):
            logger.describe(_plain(told))
            if "data" in told:
                logger.data_set(data_sources(data), _plain(told["data"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or not trainer.is_global_zero:
            return
        self._last = {"value": float(value), "step": trainer.global_step}
        if self._best is None or self._better(self._last["value"], self._best["value"]):
            self._best = self._last

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._finish(trainer, "stopped" if trainer.should_stop else "finished", None)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and self._attempt:
            status = _status(exception)
            self._finish(trainer, status, f"{type(exception).__name__}: {exception}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict.get("best")

    # ---- the result ----

    def _better(self, value: float, than: float) -> bool:
        if math.isnan(than) or math.isnan(value):
            return math.isnan(than)
        return value < than if self.mode == "min" else value > than

    def _finish(self, trainer: L.Trainer, status: str, error: str | None) -> None:
        end = {"event": "end", "attempt": self._attempt, "time": time.time(), "status": status}
        append_line(self.run_dir / ATTEMPTS_FILE, json.dumps({**end, "step": trainer.global_step}))
        summary = self._summary(trainer, status, error)
        self._write(SUMMARY_FILE, summary)
        flat = _flat(redact_tree(summary))
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.conclude(flat, status)
            else:
                tell(logger, lambda run: run.summary.update(flat))

    def _summary(self, trainer: L.Trainer, status: str, error: str | None) -> dict[str, Any]:
        meter = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # pyright: ignore[reportAttributeAccessIssue]
        saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((c.best_model_path for c in saved if c.monitor), "")
        newest = next((c.best_model_path for c in saved if not c.monitor), "")
        spent = attempt_times(self.run_dir)
        hours = sum(seconds * devices for seconds, devices in spent) / 3600
        price = meter.price_per_device_hour if meter else None
        return {
            "status": status,
            "error": error,
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "monitor": self.monitor,
            "mode": self.mode,
            "best": self._best,
            "final": self._last,
            "throughput": meter.summary() if meter else None,
            "wall_seconds": time.time() - self._started,
            "wall_seconds_all_attempts": sum(seconds for seconds, _ in spent),
            "device_hours": hours,
            "cost": None if price is None else hours * price,
            "attempts": self._attempt,
            "restarts": self._attempt - 1,
            "devices": trainer.world_size,
            "best_checkpoint": _relative(best, self.run_dir),
            "last_checkpoint": _relative(newest, self.run_dir),
        }

    def _write(self, name: str, value: Any) -> None:
        write_text(self.run_dir / name, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def run_folder(trainer: L.Trainer) -> Path:
    """The folder of the trainer's run: its run record's, else its ``default_root_dir``."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, RunRecord):
            return callback.run_dir
    return Path(trainer.default_root_dir)


def attempt_times(run_dir: Path) -> list[tuple[float, int]]:
    """Seconds and devices of each attempt of a run; one that was killed counts up to its last row of metrics."""
    attempts = _rows(run_dir / ATTEMPTS_FILE)
    logged = [row["time"] for row in _rows(run_dir / METRICS_FILE) if isinstance(row.get("time"), int | float)]
    ends = {row["attempt"]: row["time"] for row in attempts if row.get("event") == "end"}
    starts = [row for row in attempts if row.get("event") == "start"]
    out = []
    for row, following in zip(starts, [*starts[1:], None], strict=True):
        until = following["time"] if following else math.inf
        signs = [moment for moment in logged if row["time"] <= moment < until]
        seconds = ends.get(row["attempt"], max(signs, default=row["time"])) - row["time"]
        out.append((seconds, int(row.get("world_size") or 1)))
    return out


def data_sources(data: Any) -> dict[str, str]:
    """Path of each source of a ``ChatDataModule``, by its part, number and name."""
    parts = {"train": data.train_sources, "val": data.val_sources}
    return {
        f"{part}_{i}_{Path(source.label).name}": source.path
        for part, sources in parts.items()
        for i, source in enumerate(sources)
    }


def _digests(data: Any) -> dict[str, Any]:
    """What names the data: the key of each part's prepared rows, over files, tokenizer and template; the template."""
    parts = ("train", "val") if data.val_sources or data.val_fraction else ("train",)
    keys = {part: data.prepared_rows(part).path.name for part in parts}
    return {"fingerprints": keys, "template_sha256": template_digest(data.renderer)}


def _main_versions(found: dict[str, Any]) -> dict[str, Any]:
    packages = found["packages"]
    named = {name: packages[name] for name in MAIN_PACKAGES if name in packages}
    return {**{name: value for name, value in found.items() if name != "packages"}, **named}


def _wandb_runs(trainer: L.Trainer) -> list[WandbRun]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbRun)]


def _status(exception: BaseException) -> str:
    if isinstance(exception, PreemptedError):
        return "preempted"
    from ptl.callbacks.rewind import RewindError  # which needs this module

    if isinstance(exception, RewindError):
        return "rewound"
    return "failed" if isinstance(exception, Exception) else "interrupted"


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.exists() else []


def _relative(path: str, folder: Path) -> str | None:
    if not path:
        return None
    resolved = Path(path).resolve()
    return str(resolved.relative_to(folder.resolve())) if resolved.is_relative_to(folder.resolve()) else redact(path)


def _plain(value: Any) -> Any:
    """A tree as JSON has it, without secrets; what JSON lacks as strings."""
    return json.loads(json.dumps(redact_tree(_finite(value)), default=str))


def _finite(value: Any) -> Any:
    """Numbers that JSON lacks as strings, everywhere in a tree."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _flat(tree: dict[str, Any], prefix: str = "run") -> dict[str, Any]:
    """``{"throughput": {"mfu": 0.4}}`` as ``{"run/throughput/mfu": 0.4}``; unknown values are left out."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}"
        if isinstance(value, dict):
            out.update(_flat(value, name))
        elif value is not None:
            out[name] = value
    return out
