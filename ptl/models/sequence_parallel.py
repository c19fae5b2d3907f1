"""Sequence parallelism: the ranks of a group share each packed row, every rank a slice of its tokens.

What looks at one token at a time (embedding, norms, MLP, head, loss) runs on a rank's own slice, so that what it keeps
for the backward pass is a share of the row's. Attention looks at them all: an exchange in front of it gives each rank
all tokens of a share of the heads, and one behind it gives back all heads of its own tokens (DeepSpeed-Ulysses: Jacobs
et al. 2023, arXiv:2309.14509; with transformers' models: Bekman et al. 2025, arXiv:2506.13996). Heads of keys and
values that are too few to share are repeated. The ranks' losses add up to the row's loss, and their gradients to its
gradient.

Shape letters: N ranks of a group, T tokens of the row, B is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ptl.types import TokenBatch

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of rotary embedding whose frequencies follow the longest position in sight, which is another on each slice."""


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a row.

    Attributes:
        group: their process group.
        size: N.
        rank: of this process among them; its slice is the one of that number.
    """

    group: Any
    size: int
    rank: int

    def own(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's share of a dimension that N divides."""
        return tensor.unflatten(dim, (self.size, -1)).select(dim, self.rank)


def join_group(size: int) -> SequenceGroup:
    """This process's group of ``size`` ranks that follow each other. All ranks of the job call it together.

    Raises:
        ValueError: there is another number of ranks than some groups of that size.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world % size:
        raise ValueError(
            f"model.sequence_parallel {size} must divide the number of ranks, got {world}: change it, or "
            "trainer.devices and trainer.num_nodes"
        )
    group, _ = dist.new_subgroups(size)
    return SequenceGroup(group, size, dist.get_rank() % size)


def check_shareable(config: Any, size: int) -> None:
    """Refuses a model whose rows cannot be shared.

    Args:
        config: its configuration, that of the text model.
        size: N.

    Raises:
        ValueError: N does not divide its heads, or its positions depend on the length of the row.
    """
    heads = config.num_attention_heads
    if heads % size:
        fitting = [n for n in range(2, heads + 1) if heads % n == 0]
        raise ValueError(
            f"model.sequence_parallel {size} must divide the model's {heads} attention heads: set it to one of "
            f"{', '.join(map(str, [1, *fitting]))}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if found := kinds & set(_BY_LENGTH):
        raise ValueError(
            f"model.sequence_parallel {size}: rotary positions of kind {found.pop()!r} depend on the length of the "
            "row, which no rank sees: set it to 1, or another rope_type in policy.config_overrides.rope_parameters"
        )


def filled_row(batch: TokenBatch, size: int) -> TokenBatch:
    """A packed batch with a document of no weight behind its own, so that N divides its length; or the same batch."""
    missing = -batch.input_ids.shape[1] % size
    if not missing:
        return batch
    assert batch.cu_seqlens is not None
    places = torch.arange(missing, device=batch.input_ids.device)[None]
    return batch._replace(
        input_ids=pad(batch.input_ids, (0, missing)),
        loss_mask=pad(batch.loss_mask, (0, missing)),
        position_ids=torch.cat([batch.position_ids, places], 1),
        document_ids=pad(batch.document_ids, (0, missing), value=len(batch.sources)),
        sources=pad(batch.sources, (0, 1)),
        cu_seqlens=torch.cat([batch.cu_seqlens, batch.cu_seqlens[-1:] + missing]),
        rows=None,
        host_lengths=None if batch.host_lengths is None else np.append(batch.host_lengths, missing),
        documents=None,
    )


def all_tokens(query: Tensor, key: Tensor, value: Tensor, sequence: SequenceGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of this rank's tokens to this rank's heads of all tokens; collective.

    Args:
        query: [B, Hq, T / N, D]; N divides Hq.
        key: [B, Hk, T / N, D], Hq a multiple of Hk.
        value: [B, Hk, T / N, Dv].
        sequence: the group.

    Returns:
        [B, Hq / N, T, D] and keys and values of the heads that those queries see, at least one.
    """
    # Repeated so often that N divides them: the fewest that do still divide the queries' heads, as N and Hk do.
    often = sequence.size // math.gcd(sequence.size, key.shape[1])
    if often > 1:
        key, value = key.repeat_interleave(often, 1), value.repeat_interleave(often, 1)
    return tuple(_Exchange.apply(t, sequence, 1, 2) for t in (query, key, value))  # pyright: ignore[reportReturnType]


def own_tokens(attended: Tensor, sequence: SequenceGroup) -> Tensor:
    """Back from this rank's heads of all tokens [B, T, H / N, D] to all heads of its own [B, T / N, H, D]."""
    return _Exchange.apply(attended, sequence, 1, 2)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    """Cuts one dimension into N parts, sends the k-th to the k-th rank, and joins what has come along another.

    Its gradient is the exchange the other way.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sequence: SequenceGroup, cut: int, join: int) -> Tensor:
        ctx.how = (sequence, join, cut)
        return _exchange(tensor, sequence, cut, join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], *ctx.how), None, None, None


def _exchange(tensor: Tensor, sequence: SequenceGroup, cut: int, join: int) -> Tensor:
    parts = torch.stack(tensor.unflatten(cut, (sequence.size, -1)).unbind(cut))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=sequence.group)
    return torch.cat(received.unbind(0), join)
