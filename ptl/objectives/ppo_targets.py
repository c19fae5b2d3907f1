"""From judged answers and what the critic said of them to advantages, returns, and what there is to log of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ptl.functional.gae import Estimate, generalised_advantages, token_rewards
from ptl.functional.moments import explained_variance, explained_variance_sums, moment_sums, whiten
from ptl.rollout.buffer import Group
from ptl.rollout.rollouts import Sums
from ptl.types import RolloutBatch


class RolloutSums(NamedTuple):
    """What a rollout's numbers need, to be added up over micro-batches and ranks; float64.

    Attributes:
        advantages: ``moment_sums`` [3], before they are whitened.
        explained: ``explained_variance_sums`` [6] of the values and the returns.
        divergence: [2], sum of the tokens' divergence from the reference, and answers.
        lengths: [6], answers; sums of the reward and of the length, of both squared, and of their product.
    """

    advantages: Tensor
    explained: Tensor
    divergence: Tensor
    lengths: Tensor

    @classmethod
    def split(cls, flat: Tensor) -> RolloutSums:
        """Out of one vector [17], such as ``torch.cat`` makes of it; a collective takes it in one go."""
        return cls(*flat.split([3, 6, 2, 6]))


def targets_of(
    batch: RolloutBatch,
    scores: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    *,
    kl: Tensor | None,
    coefficient: float,
    discount: float,
    decay: float,
) -> tuple[Estimate, RolloutSums]:
    """Advantages and returns of a micro-batch's trained tokens, and the micro-batch's part of the rollout's sums.

    Args:
        batch: whole answers; all its tokens are trained.
        scores: [D], of the answers.
        values: [M], of the states before the tokens.
        bootstrap: [D], what is expected to follow the answers.
        kl: [M], what the divergence takes from a token's reward, or None.
        coefficient: its factor.
        discount, decay: of ``generalised_advantages``.
    """
    owners, ones = batch.answers.owners, torch.ones_like(values, dtype=torch.bool)
    rewards = token_rewards(scores, ones, owners, kl=kl, coefficient=coefficient)
    found = generalised_advantages(rewards, values, ones, owners, bootstrap, discount=discount, decay=decay)
    lengths = owners.bincount(minlength=len(scores)).double()
    present = lengths > 0
    reward, length = batch.rewards.double()[present], batch.answers.lengths.double()[present]
    products = torch.stack([reward, length, reward.square(), length.square(), reward * length])
    total = torch.zeros((), dtype=torch.float64, device=values.device) if kl is None else kl.double().sum()
    sums = RolloutSums(
        moment_sums(found.advantages, ones),
        explained_variance_sums(values, found.returns, ones),
        torch.stack([total, present.sum().double()]),
        torch.cat([present.sum().double()[None], products.sum(1)]),
    )
    return found, sums


def whiten_advantages(groups: Sequence[Group], sums: Tensor) -> None:
    """Puts the advantages of all trained tokens on one scale, by the ``moment_sums`` of the whole rollout."""
    answers = [answer for group in groups for answer in group.answers]
    if not answers:
        return
    mask = torch.from_numpy(np.concatenate([answer.trained for answer in answers]))
    raw = torch.from_numpy(np.concatenate([answer.tokens["advantages"] for answer in answers]))
    white = whiten(raw, mask, sums).numpy()
    for answer, own in zip(answers, np.split(white, np.cumsum([len(answer.ids) for answer in answers])[:-1])):
        answer.tokens["advantages"] = own


def numbers(sums: RolloutSums, *, held: bool, coefficient: float | None) -> Sums:
    """What there is to log of a rollout, name -> (sum, weight), from the sums of all ranks.

    Args:
        sums: of the rollout.
        held: whether there is a reference.
        coefficient: of its divergence in the reward; None where it is not there.
    """
    tokens, returns = sums.explained[:2].tolist()
    found: Sums = {"returns": (returns, tokens)}
    explained, slope = explained_variance(sums.explained), correlation(sums.lengths)
    if explained is not None:
        found["explained_variance"] = (explained, 1.0)
    if slope is not None:
        found["reward_length"] = (slope, 1.0)
    if held:
        divergence, answers = sums.divergence.tolist()
        found |= {"sequence_kl": (divergence, answers), "token_kl": (divergence, tokens)}
    if coefficient is not None:
        found["kl_coefficient"] = (coefficient, 1.0)
    return found


def correlation(sums: Tensor) -> float | None:
    """Pearson's r of two quantities, in [-1, 1], from float64 [6]: n, sums of x, y, x^2, y^2 and xy; None without."""
    n, x, y, xx, yy, xy = sums.tolist()
    if n < 2:
        return None
    of_x, of_y = xx - x * x / n, yy - y * y / n
    if not (of_x > 1e-9 * xx and of_y > 1e-9 * yy):
        return None
    return max(-1.0, min(1.0, (xy - x * y / n) / (of_x * of_y) ** 0.5))


NAMES = ("returns", "explained_variance", "reward_length", "sequence_kl", "token_kl", "kl_coefficient")
"""What ``numbers`` may hold."""
