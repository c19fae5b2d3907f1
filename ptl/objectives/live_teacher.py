"""A teacher that runs in this job: built, placed and asked here, and registered nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from ptl.functional.fused_divergence import Side
from ptl.models.heads import block_outputs, chosen, head_side, hidden_states
from ptl.models.teachers import Teacher, build_teacher, check_room
from ptl.models.zero3 import zero3_hidden
from ptl.strategies.frozen import ShardedModel
from ptl.strategies.partition import gathered
from ptl.types import TokenBatch


class LiveTeacher:
    """A frozen model beside the student. It is no ``nn.Module``: nothing trains it, saves it or switches its mode.

    Arguments:
        teacher: which model, and where.
        beside: the student, whose ZeRO-3 strategy would otherwise cut a replica too.

    Attributes:
        model: the model.

    Raises:
        ValueError: as ``ptl.models.build.build``, or a sharded teacher in a single process.
    """

    def __init__(self, teacher: Teacher, *, beside: nn.Module) -> None:
        spec = teacher.model
        if spec is None:
            raise ValueError("teacher.model is not set, and there is no cache to read: set teacher.model.name")
        self._device = torch.device(teacher.device) if teacher.device else None
        self._head: Side | None = None
        self._sharded: ShardedModel | None = None
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        check_room(teacher, ranks=ranks, device_bytes=_device_bytes(self._device))
        if teacher.placement == "sharded":
            self._sharded = ShardedModel(lambda: build_teacher(spec))
            self.model: nn.Module = self._sharded.model
        else:
            with zero3_hidden(beside):
                self.model = build_teacher(spec)

    def place(self, device: torch.device) -> None:
        """Puts a replica where it is to run: on its own device, or on the student's ``device``."""
        where = self._device or device
        if self._sharded is None and next(self.model.parameters()).device != where:
            self.model.to(where)

    @torch.no_grad()
    def states(
        self, batch: TokenBatch, positions: Tensor, blocks: Sequence[int] = (), *, parents: np.ndarray | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Last hidden states [N, H] at flat ``positions``, and outputs [B, T, H] of some blocks, where these are.

        ``parents`` as in ``hidden_states``.
        """
        if self._sharded is not None:
            self._sharded.begin()
        device = positions.device
        where = device if self._sharded is not None else next(self.model.parameters()).device
        with block_outputs(self.model, list(blocks)) as seen:
            states = hidden_states(self.model, batch.on(where), parents=parents)
            hidden = chosen(states, positions.to(where))
        return hidden.to(device), {block: states.to(device) for block, states in seen.items()}

    @contextmanager
    def side(self, hidden: Tensor) -> Iterator[Side]:
        """The teacher's side of a loss, with its head whole on the device of ``hidden`` inside.

        Of a teacher that is elsewhere the head is copied once and kept: it is what meets the student's logits.
        """
        if self._sharded is not None:
            side = head_side(self.model, hidden)
            with gathered([t for t in (side.weight, side.bias) if t is not None]):
                yield side
            return
        if self._head is None or self._head.weight.device != hidden.device:
            side = head_side(self.model, hidden.to(next(self.model.parameters()).device))
            bias = None if side.bias is None else side.bias.to(hidden.device)
            self._head = side._replace(weight=side.weight.to(hidden.device), bias=bias)
        yield self._head._replace(hidden=hidden)

    def whole(self) -> AbstractContextManager[None]:
        """A sharded teacher is whole on every rank inside, which all enter and leave together; a replica is as it was.

        For generating. Each rank needs the memory, see ``ptl.strategies.partition.has_room_for_whole``.
        """
        return nullcontext() if self._sharded is None else self._sharded.whole()

    def close(self) -> None:
        """Takes a sharded teacher's hooks off."""
        if self._sharded is not None:
            self._sharded.close()


def _device_bytes(device: torch.device | None) -> int:
    """Memory of the device, by default of the one that this rank trains on; of a CPU the machine's."""
    on_gpu = device.type == "cuda" if device is not None else torch.cuda.is_available()
    if on_gpu:
        return torch.cuda.get_device_properties(device or torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
