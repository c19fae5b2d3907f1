"""Watches that training stays sound: losses, gradients, steps that are left out, and when to go back.

Nothing waits for the device between two looks, which come once a logging interval. All ranks look together and stop
together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from ptl.callbacks.guard import Spike, StepGuard, Verdict, gradients_of, release, withhold
from ptl.callbacks.record import run_folder
from ptl.callbacks.rewind import DivergedError, RewindError, apply_rewind, choose_rewind
from ptl.callbacks.throughput import log_metrics, token_batches
from ptl.data.durable import append_line

SKIPPED_FILE = "skipped.jsonl"
_WHAT = {
    "loss": "the loss is not finite",
    "gradient": "the gradient is not finite",
    "spike": "the norm of the gradient spikes",
}


@runtime_checkable
class EngineStrategy(Protocol):
    """A strategy whose engine owns gradients and may skip steps, as ZeRO does."""

    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradients over all ranks, before clipping."""
        ...

    def skipped_steps(self) -> int:
        """Steps that the engine left out because a gradient was not finite."""
        ...

    def judges_steps(self) -> bool:
        """Whether the engine does that; where it does not, the gradients are as they are without an engine."""
        ...

    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that the engine calls, once or more a step, to change weights, or ValueError."""
        ...

    def step_norm(self) -> Tensor:
        """Within a call of the inner optimizer: norm of the step's gradients over all ranks, before clipping."""
        ...


class Health(L.Callback):
    """Leaves out steps that would break the weights, and ends a run of which step after step has to be left out.

    A step whose loss or gradient is not finite on any rank, or with ``spike`` whose gradient's norm stands out from
    those before, changes nothing, on all ranks. The trainer counts it as done and the schedule moves on, as
    DeepSpeed has it. What was left out is looked at once a logging interval, before a checkpoint is written and at the
    end: ``health/skipped_steps`` (of the whole run) and ``health/grad_norm`` (of the last step, before clipping) are
    logged, and ``RUN/skipped.jsonl`` says for each step why and on which rows of the prepared data.

    After ``max_skipped_in_a_row`` steps the run goes back to its newest checkpoint from before them, with the data from
    behind them, in a new attempt (``ptl.callbacks.rewind``), at most ``max_rewinds`` times.

    ZeRO (but for stage 0 in fp32) leaves out by itself what is not finite, and takes the norm inside its step, where
    ``spike`` then judges it. With ``16-mixed`` the gradient scaler leaves steps out by itself, as part of finding its
    scale: no ``spike`` there.

    At the start of a fit on a CPU that has no fast bf16, a line says so where the run would compute in it.

    Arguments:
        every_n_steps: optimizer steps between looks; the trainer's ``log_every_n_steps`` by default.
        spike: which gradient norms stand out; None for none. There is no default, because what is rare differs:
            reinforcement learning and small batches have honest norms far above the median.
        max_skipped_in_a_row: steps that may be left out one after another.
        max_rewinds: of a run; 0 ends it at once.

    Raises:
        RewindError: from the training loop, on every rank: the next attempt goes on from an earlier checkpoint.
        DivergedError: from there too: there is no checkpoint, or there were too many rewinds.
        ValueError: a number out of its range, or ``spike`` where nobody can judge the gradient before it is applied.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        spike: Spike | None = None,
        max_skipped_in_a_row: int = 10,
        max_rewinds: int = 2,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Health.every_n_steps must be 1 or more, got {every_n_steps}")
        if max_skipped_in_a_row < 1:
            raise ValueError(f"health.max_skipped_in_a_row must be 1 or more, got {max_skipped_in_a_row}")
        if max_rewinds < 0:
            raise ValueError(f"health.max_rewinds must be 0 or more, got {max_rewinds}")
        self.every_n_steps = every_n_steps
        self.spike = spike
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.max_rewinds = max_rewinds
        self._guard: StepGuard | None = None
        self._engine: EngineStrategy | None = None
        self._engine_total = 0
        self._scaled = False
        self._engine_skipped: dict[int, bool] = {}
        self._hooks: list[Any] = []
        self._bad: Tensor | None = None
        self._taken: list[tuple[Any, Tensor]] = []
        self._rows: dict[int, list[Tensor]] = {}
        self._skipped = 0
        self._row: list[Verdict] = []
        self._norm = float("nan")
        self._global_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy: Any = trainer.strategy
        self._engine = strategy if isinstance(strategy, EngineStrategy) and strategy.judges_steps() else None
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self.spike is not None and scaled:
            raise ValueError(
                f"health.spike needs the gradients as they are, and with trainer.precision {trainer.precision} they "
                "are scaled: remove health.spike, or set trainer.precision to bf16-mixed, bf16-true or 32-true"
            )
        self._scaled = scaled
        judges = self._engine is None
        self._guard = StepGuard(trainer.strategy.root_device, trainer.world_size, spike=self.spike, judges=judges)
        self._engine_skipped, self._rows, self._row = {}, {}, []
        self._bad, self._taken = None, []
        if self._engine is not None and self.spike is not None:
            inner = self._engine.inner_optimizer()
            before = inner.register_step_pre_hook(self._before_update)
            self._hooks = [before, inner.register_step_post_hook(self._after_update)]
        self._global_step = trainer.global_step
        self._engine_total = self._engine.skipped_steps() if self._engine else 0
        rewind = apply_rewind(trainer)
        if rewind is not None and trainer.is_global_zero:
            warn(
                f"rewind {rewind.number} of at most {self.max_rewinds}: going on from optimizer step {rewind.step} "
                f"with the data from behind step {rewind.stopped}, because {rewind.reason}"
            )

    # ---- steps ----

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._guard is not None:
            self._guard.saw_loss(loss)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._guard is not None and self._guard.judges:
            bad = self._guard.judge(trainer.global_step + 1, gradients_of(optimizer))
            # Clipping comes next and needs the same norm, a pass over every gradient.
            pl_module.gradient_norm = self._guard.norm  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            if not self._scaled:
                withhold(optimizer, bad)

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Judges an engine's step before the first part of it, and keeps every part from changing anything."""
        if self._guard is None or self._engine is None:
            return
        if self._bad is None:
            self._bad = self._guard.judge_norm(self._global_step + 1, self._engine.step_norm())
        self._taken = withhold(optimizer, self._bad)

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Gives the engine its gradients back: of an offloaded optimizer they are the buffers of the next step."""
        release(optimizer, self._taken)
        self._taken = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._guard is None:
            return
        stepped = trainer.global_step != self._global_step
        self._global_step = trainer.global_step
        step = trainer.global_step if stepped else trainer.global_step + 1
        self._rows.setdefault(step, []).extend(b.rows for b in token_batches(batch) if b.rows is not None)
        if not stepped:
            return
        if self._engine is not None:
            total = self._engine.skipped_steps()
            self._engine_skipped[step], self._engine_total = total > self._engine_total, total
            if self._bad is None:
                self._guard.stepped(step)
            self._bad = None
        for optimizer in trainer.optimizers:
            release(optimizer)
        if self._due(trainer, step):
            self._look(trainer)
            self._log(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of a run that has to stop must not take the place of a good one."""
        self._look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)
        self._guard = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped = state_dict["skipped"]

    def _due(self, trainer: L.Trainer, step: int) -> bool:
        every = self.every_n_steps or getattr(trainer, "log_every_n_steps", 0) or 1
        return step % every == 0

    # ---- looks ----

    def _look(self, trainer: L.Trainer) -> None:
        """Reads what became of the steps since the last look, on all ranks; notes it, and stops where it is bad."""
        if self._guard is None:
            return
        verdicts = [self._with_engine(verdict) for verdict in self._guard.read()]
        worst: list[Verdict] = []
        for verdict in verdicts:
            self._row = [*self._row, verdict] if verdict.reason else []
            worst = max(worst, self._row, key=len)
        bad = [verdict for verdict in verdicts if verdict.reason]
        if verdicts:
            self._norm = verdicts[-1].norm
        if bad:
            self._skipped += len(bad)
            note_skipped(trainer, bad, self._rows)
        done = {verdict.step for verdict in verdicts}
        self._rows = {step: rows for step, rows in self._rows.items() if step not in done}
        if len(worst) >= self.max_skipped_in_a_row:
            self._stop(trainer, worst)

    def _with_engine(self, verdict: Verdict) -> Verdict:
        skipped = self._engine_skipped.pop(verdict.step, False)
        return replace(verdict, reason="gradient") if skipped and not verdict.reason else verdict

    def _log(self, trainer: L.Trainer) -> None:
        norm: Any = self._engine.grad_norm() if self._engine is not None else self._norm
        metrics = {"health/skipped_steps": float(self._skipped)}
        if norm is not None and float(norm) == float(norm):
            metrics["health/grad_norm"] = float(norm)
        log_metrics(trainer, metrics)

    def _stop(self, trainer: L.Trainer, row: list[Verdict]) -> None:
        first, step = row[0].step, trainer.global_step
        reason = (
            f"{_WHAT[row[0].reason]} since optimizer step {first} (seen at step {step}; {len(row)} steps in a row were "
            "left out)"
        )
        rewind = choose_rewind(trainer, first_bad=first, most=self.max_rewinds, reason=reason)
        if rewind is not None:
            raise RewindError(
                f"{reason}. Rewind {rewind.number} of at most {self.max_rewinds}: run the same command with "
                f"--run.resume auto to go on from {rewind.checkpoint} with the data from behind step {rewind.stopped}"
            )
        raise DivergedError(
            f"{reason}, and there is no rewind left or no checkpoint from before. Lower the learning rate "
            "(model.optimizer.lr), clip gradients (trainer.gradient_clip_val: 1.0) or look at the data of these steps "
            f"({SKIPPED_FILE} in the run folder), then resume from the last checkpoint"
        )


def note_skipped(trainer: L.Trainer, verdicts: list[Verdict], rows: Mapping[int, list[Tensor]]) -> None:
    """Appends the steps that were left out to ``RUN/skipped.jsonl``, each with every rank's row numbers; collective."""
    own = {verdict.step: [int(n) for part in rows.get(verdict.step, []) for n in part.tolist()] for verdict in verdicts}
    everyone: list[Any] = [own]
    if trainer.world_size > 1:
        everyone = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, own)
    if not trainer.is_global_zero:
        return
    for verdict in verdicts:
        row = {
            "step": verdict.step,
            "epoch": trainer.current_epoch,
            "reason": verdict.reason,
            "grad_norm": verdict.norm if math.isfinite(verdict.norm) else None,
            "rows": [found[verdict.step] for found in everyone],
        }
        append_line(run_folder(trainer) / SKIPPED_FILE, json.dumps(row))


def warn(text: str) -> None:
    """One line on stderr."""
    Console(stderr=True).print(f"ptl: warning: {text}", style="yellow", soft_wrap=True, highlight=False, markup=False)
