"""Weights that make up for sampling with another engine than the one that trains.

An engine that samples in other kernels, another precision or with older weights draws from b, while the trainer
believes it was o. The weight of a token is ``r = exp(o - b)``, of a sequence the product over its trained tokens.
Both cures bound it, for its variance has no bound:

- ``truncate`` (TIS; Ionides, 2008): min(r, high). Biased a little, keeps every token.
- ``mask`` (MIS, IcePop): r where low <= r <= high, else 0. Drops what the trainer would never have written.

They multiply the policy's part of the loss alone, and they are right only where b is the distribution that was sampled
from: with top-p below 1, or top-k, it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ptl.functional.kl import BOUND
from ptl.functional.sequences import per_sequence


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How tokens are weighed.

    Attributes:
        method: ``truncate`` or ``mask``.
        level: of one ``token``, or of a whole ``sequence``.
        high: largest weight, 1 or above.
        low: least weight that ``mask`` keeps, in [0, 1].

    Raises:
        ValueError: a number out of its range.
    """

    method: Literal["truncate", "mask"] = "truncate"
    level: Literal["token", "sequence"] = "token"
    high: float = 2.0
    low: float = 0.0

    def __post_init__(self) -> None:
        if not self.high >= 1:
            raise ValueError(f"high must be 1 or above, got {self.high}: engines that agree have the weight 1")
        if not 0 <= self.low <= 1:
            raise ValueError(f"low must be in [0, 1], got {self.low}: engines that agree have the weight 1")
        if self.low and self.method == "truncate":
            raise ValueError(f"low is {self.low}, and truncate has no lower bound: take method mask, or leave low out")


class Correction(NamedTuple):
    """Weights and what there is to say of them.

    Attributes:
        weights: [N], detached; 0 where the token is not trained.
        metrics: name -> (sum, trained tokens): ``mismatch`` (mean of \\|o - b\\|), ``mismatch_kl`` (estimate of
            KL(b || o)), ``weight`` and ``weight_square`` (of the weights as used; see ``effective_share``),
            ``weight_clipped`` (share of tokens that a bound touched).
        largest: [], largest weight before the bounds; ranks take the maximum.
    """

    weights: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]
    largest: Tensor


def importance_weights(
    trainer: Tensor, behaviour: Tensor, mask: Tensor, owners: Tensor, sequences: int, how: Importance
) -> Correction:
    """The weights of N sampled tokens.

    Args:
        trainer: o [N], log-probabilities by the trainer before the first update on these tokens.
        behaviour: b [N], as the engine that sampled gave them.
        mask: bool [N].
        owners: int64 [N].
        sequences: S.
        how: method, level and bounds.
    """
    wide = torch.promote_types(trainer.dtype, torch.float32)
    logs = torch.where(mask, trainer.detach().to(wide) - behaviour.detach().to(wide), 0.0)
    token = logs.clamp(-BOUND, BOUND).exp()
    if how.level == "token":
        raw = token
    else:
        raw = per_sequence(logs, owners, sequences).clamp(-BOUND, BOUND).exp()[owners]
    if how.method == "truncate":
        outside, weights = raw > how.high, raw.clamp(max=how.high)
    else:
        outside = (raw < how.low) | (raw > how.high)
        weights = torch.where(outside, 0.0, raw)
    weights, raw = torch.where(mask, weights, 0.0), torch.where(mask, raw, 0.0)
    count = mask.sum().to(wide)
    sums = {
        "mismatch": logs.abs(),
        "mismatch_kl": token - 1 - logs,
        "weight": weights,
        "weight_square": weights.square(),
        "weight_clipped": (outside & mask).to(wide),
    }
    metrics = {name: (torch.where(mask, value, 0.0).sum(), count) for name, value in sums.items()}
    return Correction(weights, metrics, raw.max() if raw.numel() else raw.new_zeros(()))


def effective_share(weight: float, weight_square: float) -> float:
    """The effective sample size over the number of tokens, in [0, 1] (Kong, 1992).

    Args:
        weight: mean of the weights.
        weight_square: mean of their squares.
    """
    return weight**2 / weight_square if weight_square else 0.0
