"""What the policy said, and what the rewards made of it: the table to look at before any curve."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger

from ptl.callbacks.record import run_folder
from ptl.callbacks.redact import redact_tree
from ptl.callbacks.throughput import logged_step
from ptl.data.durable import append_line
from ptl.rollout.buffer import Buffer
from ptl.rollout.shown import table

FOLDER = "completions"
TABLE_ROWS = 500
"""Rows of the W&B table: the latest ones."""


class Completions(L.Callback):
    """Keeps answers of rollouts and evaluations, each with its prompt, rewards, advantage and status.

    Every rank appends to ``RUN/completions/rank<r>.jsonl``; with W&B, rank 0's latest rows are a table
    ``completions``. ``status`` is ``ok``, ``truncated`` at the limit of its length, or ``error`` where a reward failed.

    Arguments:
        every_n_rollouts: of training; 0 keeps evaluations alone.
        per_rollout: most answers that a rank keeps of one rollout or of one batch of an evaluation; whole groups come
            first in the order of the data.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, *, every_n_rollouts: int = 1, per_rollout: int = 32) -> None:
        if every_n_rollouts < 0 or per_rollout < 1:
            raise ValueError(
                f"Completions keeps every_n_rollouts 0 or more and per_rollout 1 or more, got {every_n_rollouts} and "
                f"{per_rollout}"
            )
        self.every_n_rollouts, self.per_rollout = every_n_rollouts, per_rollout
        self._seen: Buffer | None = None
        self._count = 0
        self._rows: list[list[Any]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        buffer = getattr(getattr(pl_module, "rollouts", None), "buffer", None)
        if buffer is None or buffer is self._seen:
            return
        self._seen, self._count = buffer, self._count + 1
        if self.every_n_rollouts and (self._count - 1) % self.every_n_rollouts == 0:
            self._keep(trainer, "train", table(sorted(buffer.groups, key=lambda group: group.position)))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rollouts = getattr(pl_module, "rollouts", None)
        if rollouts is not None:
            self._keep(trainer, "val", table(rollouts.evaluated))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer)

    def _keep(self, trainer: L.Trainer, stage: str, rows: list[dict[str, Any]]) -> None:
        folder = run_folder(trainer) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows[: self.per_rollout]:
            line = {"step": trainer.global_step, "stage": stage, **redact_tree(row)}
            append_line(folder / f"rank{trainer.global_rank}.jsonl", json.dumps(line, ensure_ascii=False))
            self._rows.append([line.get(name) for name in _COLUMNS])
        self._rows = self._rows[-TABLE_ROWS:]

    def _show(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or not self._rows:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                shown = [[json.dumps(x) if isinstance(x, dict) else x for x in row] for row in self._rows]
                logger.log_table("completions", list(_COLUMNS), shown, step=logged_step(trainer))


_COLUMNS = (
    *("step", "stage", "prompt", "completion", "expected", "rewards", "reward", "advantage", "status", "tokens"),
    "origin",
)
