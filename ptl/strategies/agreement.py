"""What one rank has seen, known to all of them at the same optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed import ReduceOp


class StepAgreement:
    """Yes or no to a few questions, true for all ranks once one has said yes.

    The answers travel over the hosts' network (gloo) while the next step is computed, so that nothing waits for a
    device and a thousand ranks cost a step nothing; with several ranks they are therefore known one step late. Every
    rank makes one, and calls ``exchange`` at the same steps.

    Arguments:
        world_size: number of ranks. With one nothing is sent.
    """

    def __init__(self, world_size: int) -> None:
        self._group: Any = torch.distributed.new_group(backend="gloo") if world_size > 1 else None
        self._sent: tuple[Any, Tensor] | None = None

    def exchange(self, answers: Sequence[bool]) -> list[bool]:
        """Gives this rank's answers and returns everybody's: of this call on one rank, else of the last call."""
        if self._group is None:
            return list(answers)
        known = self._received(len(answers))
        flags = torch.tensor(answers, dtype=torch.int32)
        work = torch.distributed.all_reduce(flags, op=ReduceOp.MAX, group=self._group, async_op=True)
        self._sent = (work, flags)
        return known

    def close(self) -> None:
        """Waits for what is under way, so that no rank leaves another alone with it."""
        if self._sent is not None:
            self._received(0)

    def _received(self, count: int) -> list[bool]:
        if self._sent is None:
            return [False] * count
        work, flags = self._sent
        self._sent = None
        work.wait()
        return [bool(flag) for flag in flags.tolist()]


def silence_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Takes out the broadcast by which Lightning asks before every micro-batch whether rank 0 has had a SIGTERM.

    It reads a tensor of the device, so that the host waits for all that is queued there (Lightning issue #21487, which
    would make it optional; there is no public switch). Whoever calls this handles the signal otherwise.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # pyright: ignore[reportAttributeAccessIssue]


def _nothing() -> None:
    return None
