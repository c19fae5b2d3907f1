"""Sums over the tokens of each sequence, for tokens of many sequences that lie in one row.

Reinforcement learning writes a batch as the N tokens that were sampled, whatever the layout they were computed in:
``owners`` [N] names the sequence of each, in [0, S), and ``mask`` [N] tells those that are trained from those that a
tool wrote or that are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_sequence(values: Tensor, owners: Tensor, sequences: int) -> Tensor:
    """The sum of values [N] over each sequence's tokens [S], differentiable."""
    return values.new_zeros(sequences).index_add(0, owners, values)


def trained_lengths(mask: Tensor, owners: Tensor, sequences: int) -> Tensor:
    """Trained tokens of each sequence, int64 [S]."""
    return per_sequence(mask.long(), owners, sequences)


def without_truncated(mask: Tensor, owners: Tensor, truncated: Tensor) -> Tensor:
    """The mask [N] without the tokens of truncated sequences (DAPO's overlong filtering, arXiv:2503.14476, 3.4).

    Args:
        mask: bool [N].
        owners: int64 [N].
        truncated: bool [S], sequences that reached the limit before their end.
    """
    return mask & ~truncated[owners]


def last_trained(mask: Tensor, owners: Tensor, sequences: int) -> Tensor:
    """The index in [0, N) of each sequence's last trained token, int64 [S]; -1 where it has none."""
    index = torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    none = torch.full((sequences,), -1, dtype=torch.int64, device=mask.device)
    return none.scatter_reduce(0, owners, index, "amax")
