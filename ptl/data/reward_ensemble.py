"""Several reward models as one: scores on a common scale, their mean, their minimum, and how much they disagree.

Members trained from other seeds err in other places, so an answer that they disagree on is one whose score is worth
little (Coste et al., arXiv:2310.02743). The minimum is the cautious reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptl.data.groups import ranked_pairs
from ptl.data.scored_rankings import Scores


@dataclass(frozen=True)
class Scale:
    """What a member's scores are brought to mean 0 and deviation 1 by.

    Attributes:
        mean, std: of its scores.
        source: where they are from.
    """

    mean: float
    std: float
    source: str


def scale_of(facts: Mapping[str, Any] | None, scores: Scores) -> Scale:
    """The mean and deviation that ``ptl_reward.json`` gives, or, where it gives none, those of the scores at hand."""
    if facts is not None and facts.get("mean") is not None and facts.get("std"):
        return Scale(float(facts["mean"]), float(facts["std"]), "ptl_reward.json")
    every = np.concatenate(scores).astype(np.float64)
    return Scale(float(every.mean()), float(every.std()), "the rows of this file")


def normalised(scores: Scores, scale: Scale) -> list[np.ndarray]:
    """float64 [K] of each prompt, in deviations from the mean; a member without any deviation says 0."""
    return [(own.astype(np.float64) - scale.mean) / (scale.std or 1.0) for own in scores]


def combined(members: Sequence[Sequence[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """``mean`` and ``worst``, the minimum, over members; float64 [K] of each prompt."""
    stacked = [np.stack(own) for own in zip(*members)]
    return {"mean": [own.mean(0) for own in stacked], "worst": [own.min(0) for own in stacked]}


def disagreement(members: Sequence[Sequence[np.ndarray]], ranks: Sequence[np.ndarray]) -> dict[str, Any]:
    """Standard deviations over members, in deviations of their scores.

    Args:
        members: normalised scores [K] of each prompt, by member.
        ranks: [K] of each prompt, lower is better.

    Returns:
        ``answers``, the mean over answers; ``right_pairs`` and ``wrong_pairs``, the mean over pairs of the deviation of
        the difference of their scores, where the members' mean orders the pair as the ranking does and where it orders
        it the other way. None where there are no such.
    """
    scores = np.concatenate([np.stack(own) for own in zip(*members)], axis=1)
    pairs, _, tied = ranked_pairs(np.concatenate(ranks), [len(own) for own in ranks])
    differences = (scores[:, pairs[0]] - scores[:, pairs[1]])[:, ~tied]
    spread, mean = differences.std(0), differences.mean(0)
    return {
        "answers": float(scores.std(0).mean()),
        "right_pairs": float(spread[mean > 0].mean()) if (mean > 0).any() else None,
        "wrong_pairs": float(spread[mean < 0].mean()) if (mean < 0).any() else None,
    }
