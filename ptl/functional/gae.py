"""What PPO adds to a policy loss: rewards token by token, advantages with a critic, and the critic's own loss.

A state is what stands before a sampled token, and ``values`` [N] are the critic's at these states. Tokens that are not
trained, such as a tool's, are no actions: they lie between two states and are skipped.

Shape letters: N sampled tokens, S sequences. See ``ptl.functional.sequences`` for ``owners`` and ``mask``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptl.functional.policy_weights import Weights
from ptl.functional.sequences import last_trained
from ptl.types import LossOutput


class Estimate(NamedTuple):
    """Advantages and what the critic should have said.

    Attributes:
        advantages: [N], 0 where the token is not trained; not whitened.
        returns: [N], ``advantages + values``; never from whitened advantages.
    """

    advantages: Tensor
    returns: Tensor


def token_rewards(
    scores: Tensor, mask: Tensor, owners: Tensor, *, kl: Tensor | None = None, coefficient: float = 0.0
) -> Tensor:
    """The reward of each token [N]: the answer's score at its last trained token, and everywhere less the divergence.

    Args:
        scores: [S]; NaN is no score, and an answer without one should be masked.
        mask: bool [N].
        owners: int64 [N].
        kl: [N], ``ptl.functional.kl.kl_reward``.
        coefficient: its factor.
    """
    rewards = scores.new_zeros(len(mask)) if kl is None else torch.where(mask, -coefficient * kl.detach(), 0.0)
    at = last_trained(mask, owners, len(scores))
    there = at >= 0
    return rewards.index_add(0, at[there], scores[there].to(rewards.dtype))


def generalised_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    owners: Tensor,
    bootstrap: Tensor,
    *,
    discount: float = 1.0,
    decay: float = 0.95,
) -> Estimate:
    """GAE: ``A_t = d_t + discount decay A_(t+1)`` with ``d_t = r_t + discount V_(t+1) - V_t``.

    arXiv:1506.02438, equation 16.

    Args:
        rewards: [N].
        values: [N], by the critic before the update.
        mask: bool [N].
        owners: int64 [N], ascending; tokens of a sequence in their order.
        bootstrap: [S], the value after a sequence's last token: 0 where the answer ended, the critic's where it was
            cut.
            Zero for a cut answer would say that nothing could have come of it.
        discount: gamma, in [0, 1].
        decay: lambda, in [0, 1].

    Raises:
        ValueError: a number out of its range, or owners out of order.
    """
    for name, number in (("discount", discount), ("decay", decay)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    if len(owners) and bool((owners.diff() < 0).any()):
        raise ValueError("owners must be ascending: a sequence's tokens follow each other")
    sequences = len(bootstrap)
    wide = torch.promote_types(values.dtype, torch.float32)
    actions = mask.nonzero()[:, 0]
    of = owners[actions]
    counts = of.bincount(minlength=sequences)
    place = torch.arange(len(of), device=of.device) - (counts.cumsum(0) - counts)[of]
    longest = int(counts.max()) if sequences else 0
    grid = torch.zeros(2, sequences, longest, dtype=wide, device=values.device)
    grid[0, of, place] = rewards.detach()[actions].to(wide)
    grid[1, of, place] = values.detach()[actions].to(wide)
    after, carried = bootstrap.detach().to(wide), torch.zeros(sequences, dtype=wide, device=values.device)
    found = torch.zeros_like(grid[0])
    for t in reversed(range(longest)):
        here = t < counts
        delta = grid[0, :, t] + discount * after - grid[1, :, t]
        carried = torch.where(here, delta + discount * decay * carried, carried)
        after = torch.where(here, grid[1, :, t], after)
        found[:, t] = carried
    advantages = torch.zeros(len(mask), dtype=wide, device=values.device)
    advantages[actions] = found[of, place]
    return Estimate(advantages, torch.where(mask, advantages + values.detach().to(wide), 0.0))


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, weights: Weights, *, clip: float | None = 0.2
) -> LossOutput:
    """Half the squared error of the critic, at least that of a step held within ``clip`` of what it said before.

    ``max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2) / 2`` (the PPO code, openai/baselines ppo2).

    Args:
        values: [N], with their graph.
        old: [N], before the first update on these tokens.
        returns: [N].
        mask: bool [N].
        weights: of the tokens; ``weights_of("dapo", ...)`` is the mean over the tokens.
        clip: in the unit of the rewards, above 0; None does without.

    Returns:
        Metrics over the trained tokens: ``value_error`` (mean square, without clip), ``value_clip`` (share of tokens
        where the clipped term is the larger).

    Raises:
        ValueError: ``clip`` is not above 0.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"the clip of the values must be above 0, or null for none, got {clip}")
    wide = torch.promote_types(values.dtype, torch.float32)

    def kept(x: Tensor) -> Tensor:
        return torch.where(mask, x.to(wide), 0.0)

    v, before, target = kept(values), kept(old.detach()), kept(returns.detach())
    squares = (v - target).square()
    held = squares if clip is None else (torch.clamp(v, before - clip, before + clip) - target).square()
    worst = torch.maximum(squares, held)
    count = mask.sum().to(wide)
    metrics = {
        "value_error": (squares.detach().sum(), count),
        "value_clip": ((held > squares).to(wide).sum(), count),
    }
    return LossOutput((worst / 2 * weights.tokens.to(wide)).sum(), weights.total.to(wide), metrics)
