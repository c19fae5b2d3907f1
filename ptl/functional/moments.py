"""Means and deviations as sums, so that batches and ranks add up and one division gives those of all of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def moment_sums(values: Tensor, mask: Tensor, centre: float = 0.0) -> Tensor:
    """``(count, sum, sum of squares)`` of the values less ``centre``, float64 [3].

    Args:
        values: any shape; what is masked, or not finite, does not count.
        mask: bool, of the same shape.
        centre: a number near the mean keeps the digits of the squares; the same on all that are added up.
    """
    v = values.detach().double()
    counted = mask & torch.isfinite(v)
    v = torch.where(counted, v - centre, 0.0)
    return torch.stack([counted.sum().double(), v.sum(), v.square().sum()])


def mean_and_std(sums: Tensor, centre: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation, float64 [] each, of added-up ``moment_sums``; fewer than two deviate by 0."""
    count, total, squares = sums.double().unbind()
    mean = total / count.clamp_min(1)
    variance = (squares - count * mean.square()) / (count - 1).clamp_min(1)
    return mean + centre, variance.clamp_min(0).sqrt()


def whiten(values: Tensor, mask: Tensor, sums: Tensor, *, centre: bool = True) -> Tensor:
    """Values less their mean and over their deviation, where the mask is set, else 0.

    Where nothing varies the deviation is rounding, and the result is exactly 0.

    Args:
        values: any shape.
        mask: bool, of the same shape.
        sums: ``moment_sums`` of the whole batch: all micro-batches and ranks.
        centre: False divides alone, and leaves values that do not vary as they are.
    """
    mean, std = mean_and_std(sums)
    varies = std > 1e-6 * mean.abs().clamp_min(1.0)
    if centre:
        white = torch.where(varies, (values - mean) / std.clamp_min(1e-12), 0.0)
    else:
        white = torch.where(varies, values / std.clamp_min(1e-12), values)
    return torch.where(mask, white, 0.0).to(values.dtype)


def explained_variance_sums(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """What ``explained_variance`` needs of a batch, float64 [6]: moments of the returns and of ``returns - values``."""
    return torch.cat([moment_sums(returns, mask), moment_sums(returns - values, mask)])


def explained_variance(sums: Tensor) -> float | None:
    """``1 - Var(returns - values) / Var(returns)``: 1 is perfect, 0 no better than a constant, below 0 is worse.

    Args:
        sums: float64 [6], added up over batches and ranks.

    Returns:
        None where the returns do not vary.
    """
    mean, std = mean_and_std(sums[:3])
    if not std > 1e-6 * mean.abs().clamp_min(1.0):
        return None
    _, rest = mean_and_std(sums[3:])
    return float(1 - (rest / std).square())


class RewardNormaliser:
    """Rewards less the mean and over the deviation of all rewards so far.

    Arguments:
        clip: largest size of a normalised reward; None keeps all.

    Attributes:
        count, mean, m2: number of rewards so far, their mean, and the sum of their squared distances from it.

    Every rank takes ``sums`` of its own rewards, all add theirs up, and each gives the total to ``add``.
    """

    def __init__(self, clip: float | None = None) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"the clip of normalised rewards must be above 0, got {clip}")
        self.clip = clip
        self.count, self.mean, self.m2 = 0.0, 0.0, 0.0

    def sums(self, rewards: Tensor) -> Tensor:
        """``moment_sums`` about the running mean, float64 [3]; what is not finite does not count."""
        return moment_sums(rewards, torch.ones_like(rewards, dtype=torch.bool), self.mean)

    def add(self, sums: Tensor) -> None:
        """Takes in a batch (Chan et al., 1979): ``sums`` [3], of all ranks, made about the mean of now."""
        count, total, squares = sums.tolist()
        if not count:
            return
        shift = total / count
        both = self.count + count
        self.m2 += squares - count * shift**2 + shift**2 * self.count * count / both
        self.mean += shift * count / both
        self.count = both

    @property
    def std(self) -> float:
        """The unbiased deviation; 1 as long as nothing varies."""
        if self.count < 2:
            return 1.0
        std = math.sqrt(max(self.m2, 0.0) / (self.count - 1))
        return std if std > 1e-6 * max(1.0, abs(self.mean)) else 1.0

    def __call__(self, rewards: Tensor) -> Tensor:
        """Normalised rewards, of the same shape and dtype; NaN stays NaN."""
        out = (rewards.double() - self.mean) / self.std
        return (out if self.clip is None else out.clamp(-self.clip, self.clip)).to(rewards.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The three numbers."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from saved numbers."""
        self.count, self.mean, self.m2 = float(state["count"]), float(state["mean"]), float(state["m2"])
