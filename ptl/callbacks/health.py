"""Watches that training stays sound: finite losses, gradient norms, skipped steps.

Nothing waits for the device between two looks, which come once a logging interval. All ranks look together and stop
together.
"""

from __future__ import annotations

import time
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.utils import get_total_norm

from ptl.callbacks.throughput import log_metrics

NO_STEP = 2**53
"""Above any step number, and exact in float64."""
SLOW_BF16 = 4.0
"""How many times slower than float32 a CPU may be in bf16 before it is said; one with bf16 instructions is faster."""


class DivergedError(RuntimeError):
    """Training went wrong in a way that going on cannot mend."""


@runtime_checkable
class EngineStrategy(Protocol):
    """A strategy whose engine owns gradients and may skip steps, as ZeRO does."""

    def grad_norm(self) -> Tensor | None:
        """Norm of the last step's gradients over all ranks, before clipping."""
        ...

    def skipped_steps(self) -> int:
        """Steps that the engine left out because a gradient was not finite."""
        ...


class Health(L.Callback):
    """Logs ``health/grad_norm`` and ``health/skipped_steps``, and stops a run whose loss is no longer a number.

    The gradient norm is the one before clipping. A loss that is not finite is noticed at the next look, before a
    checkpoint is written, or at the end, and named with the step where it first occurred. ZeRO stops by itself when it
    skips step after step.

    At the start of a fit on a CPU that has no fast bf16, a line says so where the run would compute in it.

    Arguments:
        every_n_steps: optimizer steps between looks; the trainer's ``log_every_n_steps`` by default.

    Raises:
        DivergedError: from the training loop, on every rank: a loss that is not finite.
    """

    def __init__(self, *, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Health.every_n_steps must be 1 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._first_bad = torch.full((), float(NO_STEP), dtype=torch.float64)
        self._norm: Tensor | None = None
        self._global_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or trainer.strategy.root_device.type != "cpu":
            return
        keys = bf16_keys(str(trainer.precision), getattr(getattr(pl_module, "spec", None), "dtype", None))
        if keys and (slowdown := bf16_slowdown()) > SLOW_BF16:
            got, change = " and ".join(f"{key} {value}" for key, value, _ in keys), [f"{k}: {v}" for k, _, v in keys]
            Console(stderr=True).print(
                f"ptl: warning: got {got}, but this CPU computes {slowdown:.0f} times slower in bf16 than in fp32; "
                f"expected on it {', '.join(change)}",
                style="yellow",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_bad = torch.full((), float(NO_STEP), dtype=torch.float64, device=trainer.strategy.root_device)
        self._norm = None
        self._global_step = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if isinstance(trainer.strategy, EngineStrategy) or not self._due(trainer, trainer.global_step + 1):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._norm = get_total_norm(gradients) if gradients else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._global_step
        self._global_step = trainer.global_step
        self._watch_loss(trainer.global_step if stepped else trainer.global_step + 1, outputs)
        if stepped and self._due(trainer, trainer.global_step):
            self._log(trainer)
            self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint of broken weights must not take the place of a good one."""
        self._check(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer)

    def _due(self, trainer: L.Trainer, step: int) -> bool:
        every = self.every_n_steps or getattr(trainer, "log_every_n_steps", 0) or 1
        return step % every == 0

    def _watch_loss(self, step: int, outputs: Any) -> None:
        """Keeps the first step with a bad loss on the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            at = torch.where(torch.isfinite(loss.detach()).all(), float(NO_STEP), float(step))
            self._first_bad = torch.minimum(self._first_bad, at.to(self._first_bad))

    def _log(self, trainer: L.Trainer) -> None:
        strategy = trainer.strategy
        metrics: dict[str, float] = {}
        if isinstance(strategy, EngineStrategy):
            norm = strategy.grad_norm()
            metrics["health/skipped_steps"] = float(strategy.skipped_steps())
        else:
            norm = self._norm
        if norm is not None:
            metrics["health/grad_norm"] = float(norm)
        log_metrics(trainer, metrics)

    def _check(self, trainer: L.Trainer) -> None:
        """All ranks agree on what they saw, and stop together where it is bad."""
        first = float(trainer.strategy.reduce(self._first_bad.clone(), reduce_op="min"))
        if first < NO_STEP:
            raise DivergedError(
                f"the loss is not finite since optimizer step {int(first)} (seen at step {trainer.global_step}). "
                "Lower the learning rate (model.optimizer.lr), clip gradients (trainer.gradient_clip_val: 1.0) or look "
                "at the data of that step, then resume from the last checkpoint"
            )


def bf16_keys(precision: str, dtype: str | None) -> list[tuple[str, str, str]]:
    """Keys of a run that make it compute in bf16, each with its value and the one that does not.

    Arguments:
        precision: the trainer's.
        dtype: the policy's, where there is one.
    """
    keys = []
    if precision.startswith("bf16"):
        keys.append(("trainer.precision", precision, "32-true"))
    if dtype == "bf16":
        keys.append(("model.init_args.policy.dtype", dtype, "fp32"))
    return keys


def bf16_slowdown(size: int = 192) -> float:
    """Time of a [size, size] matrix product on the CPU in bf16 over its time in fp32, by a probe of about 50 ms."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(size, size, dtype=dtype)
        best = float("inf")
        for _ in range(3):  # the first one also makes the kernel
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.bfloat16) / seconds(torch.float32)
