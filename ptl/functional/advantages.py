"""Advantages of whole answers: how much better each was than what it is compared with.

Everything is computed in float64. An answer without a reward (NaN) is compared with nothing and nothing is compared
with it: its advantage is 0, and its tokens should be masked. Rewards that differ by rounding alone are equal, and their
advantages exactly 0: sums of the same parts in another order must not become a signal once they are divided by their
own deviation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ptl.functional.moments import mean_and_std, moment_sums

Baseline = Literal["group", "leave_one_out", "batch", "none"]
Scale = Literal["group", "batch", "none"]
TIE = 1e-6
"""Rewards that are nearer than this, relative to the largest of them or to 1, are equal."""
LEAST_STD = 1e-4
"""What is divided by is at least this: the noise of a reward model on answers as good as equal must stay noise."""


def advantages_of(
    rewards: Tensor,
    groups: Tensor,
    *,
    baseline: Baseline = "group",
    scale: Scale = "none",
    batch_sums: Tensor | None = None,
) -> Tensor:
    """The advantage of each answer, float64 [S].

    Args:
        rewards: [S]; what is not finite is no reward.
        groups: int64 [S], the prompt of each answer; whole groups.
        baseline: what is taken off. ``group``: the mean of the group (GRPO, arXiv:2402.03300); ``leave_one_out``: that
            of its other answers (RLOO, arXiv:2402.14740), which is n / (n - 1) times as much; ``batch``: the mean of
            all; ``none``.
        scale: what is divided by: the unbiased deviation of the ``group``, or of the ``batch``, or ``none`` (Dr. GRPO,
            arXiv:2503.20783: the deviation favours questions that are nearly solved or nearly hopeless).
        batch_sums: ``batch_sums_of`` the rewards of all ranks, added up; None is of these alone.

    Returns:
        0 where there is no reward; where the group has one reward, if the group is compared within itself; and where
        all that is compared is equal.

    Raises:
        ValueError: a group of one answer, compared within itself.
    """
    r = rewards.detach().double()
    known = torch.isfinite(r)
    r = torch.where(known, r, 0.0)
    _, index = groups.unique(return_inverse=True)
    prompts = int(index.max()) + 1 if len(index) else 0
    within = baseline in ("group", "leave_one_out")
    if (within or scale == "group") and prompts and int(index.bincount().min()) < 2:
        name = f"baseline {baseline}" if within else f"scale {scale}"
        raise ValueError(
            f"{name} compares the answers to a prompt with each other, and a prompt has one answer alone: sample 2 or "
            "more answers to a prompt, or take baseline batch or none, without scale group"
        )
    counts = r.new_zeros(prompts).index_add(0, index, known.double())
    mean = r.new_zeros(prompts).index_add(0, index, r) / counts.clamp_min(1)
    of_all = batch_sums_of(rewards) if batch_sums is None else batch_sums
    batch_mean, batch_std = mean_and_std(of_all)
    told_apart = _differ(r, known, index, prompts)[index] & (counts[index] > 1)

    if within:
        a = r - mean[index]
        if baseline == "leave_one_out":
            a = a * (counts / (counts - 1).clamp_min(1))[index]
        known = known & told_apart
    elif baseline == "batch":
        a = r - batch_mean
        known = known & (batch_std > TIE * batch_mean.abs().clamp_min(1.0))
    else:
        a = r
    if scale == "group":
        squares = torch.where(torch.isfinite(rewards), (r - mean[index]).square(), 0.0)
        variance = r.new_zeros(prompts).index_add(0, index, squares) / (counts - 1).clamp_min(1)
        a = a / variance.sqrt().clamp_min(LEAST_STD)[index]
        known = known & told_apart
    elif scale == "batch":
        a = a / batch_std.clamp_min(LEAST_STD)
    return torch.where(known, a, 0.0)


def batch_sums_of(rewards: Tensor) -> Tensor:
    """What ``advantages_of`` needs of a rank's rewards to compare over all ranks, float64 [3]; ranks add theirs up."""
    return moment_sums(rewards, torch.ones_like(rewards, dtype=torch.bool))


def tells_apart(rewards: Tensor, groups: Tensor) -> Tensor:
    """Whether an answer's group has two rewards that differ, bool [S]: where not, it has nothing to teach.

    Args:
        rewards: [S]; what is not finite is no reward.
        groups: int64 [S].
    """
    r = rewards.detach().double()
    known = torch.isfinite(r)
    _, index = groups.unique(return_inverse=True)
    prompts = int(index.max()) + 1 if len(index) else 0
    return _differ(torch.where(known, r, 0.0), known, index, prompts)[index]


def _differ(r: Tensor, known: Tensor, index: Tensor, prompts: int) -> Tensor:
    """bool [P]."""
    low = r.new_full((prompts,), torch.inf).scatter_reduce(0, index, torch.where(known, r, torch.inf), "amin")
    high = r.new_full((prompts,), -torch.inf).scatter_reduce(0, index, torch.where(known, r, -torch.inf), "amax")
    return high - low > TIE * torch.maximum(low.abs(), high.abs()).clamp_min(1.0)
