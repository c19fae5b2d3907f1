"""Leaves out optimizer steps that would break the weights, without waiting for the device.

A step's verdict is a number on the device, the same on every rank. The fused optimizers of torch read it there
(``found_inf``, which torch's own gradient scaler uses): a step that is left out changes neither weights nor moments
nor the optimizer's count, and one that is not is bit by bit what it would be without. Any other optimizer has its
gradients taken away, which needs the verdict on the host: one wait a step. An engine that steps by itself, as ZeRO's,
leaves out by itself what is not finite; what stands out is judged within its step, by hooks of the optimizer that it
calls, once it has taken the norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ptl.functional.spikes import spike_limit

REASONS = ("loss", "gradient", "spike")


@dataclass(frozen=True, kw_only=True)
class Spike:
    """When the norm of a gradient, before clipping, counts as a spike.

    Attributes:
        deviations: above the median of the last norms, in robust standard deviations (1.4826 median absolute
            deviations, 5 % of the median at least).
        window: how many last norms; those of steps that were left out are not among them.
        least: norms that must be known before any counts as a spike.
    """

    deviations: float = 10.0
    window: int = 128
    least: int = 32

    def __post_init__(self) -> None:
        if not self.deviations > 0:
            raise ValueError(f"health.spike.deviations must be above 0, got {self.deviations}")
        if not 1 <= self.least <= self.window:
            raise ValueError(
                f"health.spike.least must be between 1 and health.spike.window {self.window}, got {self.least}"
            )


@dataclass(frozen=True)
class Verdict:
    """What is known of an optimizer step.

    Attributes:
        step: its number, from 1.
        reason: why it was left out, of ``REASONS``; empty where it was not.
        norm: of its gradient before clipping; NaN where it was not taken.
    """

    step: int
    reason: str
    norm: float


class StepGuard:
    """Judges the optimizer steps of a fit.

    Arguments:
        device: of the gradients.
        world_size: ranks, which agree on each verdict.
        spike: what counts as a spike; None for nothing.
        judges: whether the gradients are at hand before the step; else the engine judges whether they are finite.
    """

    def __init__(self, device: torch.device, world_size: int, *, spike: Spike | None, judges: bool) -> None:
        self.judges = judges
        self._spike = spike
        self._world_size = world_size
        self._bad_loss = torch.zeros((), device=device)
        self._norms = torch.full((spike.window if spike else 1,), torch.nan, device=device)
        self._judged = 0
        self._open: list[tuple[int, Tensor]] = []
        self.norm: Tensor | None = None
        """Norm of the gradients that were judged last, float32 []; None before the first."""

    def saw_loss(self, loss: Tensor) -> None:
        """Notes whether a micro-batch's loss is finite."""
        self._bad_loss = torch.maximum(self._bad_loss, (~torch.isfinite(loss.detach()).all()).to(self._bad_loss))

    def judge(self, step: int, gradients: list[Tensor]) -> Tensor:
        """The verdict on a step whose gradients are complete: 1 where it must be left out, float32 []; collective."""
        return self.judge_norm(
            step, get_total_norm(gradients).float() if gradients else torch.zeros_like(self._bad_loss)
        )

    def judge_norm(self, step: int, norm: Tensor) -> Tensor:
        """The same of gradients of which the norm is known, float32 []; collective."""
        self.norm = norm
        flags = [self._bad_loss, (~torch.isfinite(norm)).to(self._bad_loss), torch.zeros_like(norm)]
        if self._spike is not None:
            limit = spike_limit(self._norms, self._spike.deviations, self._spike.least)
            flags[2] = (norm > limit).to(self._bad_loss)
        found = torch.stack(flags)
        if self._world_size > 1:
            # Not strategy.reduce, whose barrier waits for the device.
            torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        bad = found.amax()
        place = self._judged % len(self._norms)
        self._norms[place] = torch.where(bad > 0, self._norms[place], norm)
        self._judged += 1
        self._note(step, torch.cat([found, norm[None]]))
        return bad

    def stepped(self, step: int) -> None:
        """Notes a step on which an engine alone has judged."""
        self._note(
            step, torch.stack([self._bad_loss, *self._bad_loss.new_zeros(2), self._bad_loss.new_full((), torch.nan)])
        )

    def read(self) -> list[Verdict]:
        """The verdicts since the last reading, the same on every rank; collective, and waits for the device once."""
        if not self._open:
            return []
        table = torch.stack([row for _, row in self._open])
        if self._world_size > 1 and not self.judges:
            torch.distributed.all_reduce(table, op=torch.distributed.ReduceOp.MAX)
        found = [
            Verdict(step, next((name for name, flag in zip(REASONS, row) if flag), ""), row[-1])
            for (step, _), row in zip(self._open, table.tolist())
        ]
        self._open = []
        return found

    def _note(self, step: int, row: Tensor) -> None:
        self._open.append((step, row))
        self._bad_loss = torch.zeros_like(self._bad_loss)


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All gradients of an optimizer's parameters."""
    return [p.grad for p in _parameters(optimizer) if p.grad is not None]


def withhold(optimizer: torch.optim.Optimizer, bad: Tensor) -> list[tuple[Any, Tensor]]:
    """Has the step that is under way leave everything as it is where ``bad`` is 1; between backward and step.

    Returns:
        Parameters whose gradients were taken away, and these.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        return []
    if not bool(bad):
        return []
    taken = [(p, p.grad) for p in _parameters(optimizer) if p.grad is not None]
    for parameter, _ in taken:
        # Every optimizer passes over a parameter without a gradient: no decay, no momentum, no count.
        parameter.grad = None
    return taken


def release(optimizer: torch.optim.Optimizer, taken: Iterable[tuple[Any, Tensor]] = ()) -> None:
    """Takes back what ``withhold`` has told the optimizer, and gives back gradients that it took."""
    if hasattr(optimizer, "found_inf"):
        del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    for parameter, gradient in taken:
        parameter.grad = gradient


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]
