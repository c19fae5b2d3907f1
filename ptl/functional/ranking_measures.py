"""How well scores order answers: accuracy of pairs, Kendall's tau, margin, calibration, and the part that length plays.

Everything is a sum over pairs, prompts or answers, so that batches and ranks add up and one division at the end gives
the number of the whole data set: never a mean of means of batches.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

BINS = 15
"""Bins of the calibration, of equal width on a confidence from 1/2 to 1."""
LENGTH_EDGES = (-64, -16, 17, 65)
"""Edges of the bins of length differences: better answer's tokens less the worse one's. The middle bin is -16 to 16."""
SIZES = {"pairs": 3, "prompts": 2, "answers": 3, "calibration": 3 * BINS, "lengths": 2 * (len(LENGTH_EDGES) + 1)}
"""Numbers of each kind in the vector of sums."""
TOTAL = sum(SIZES.values())


def ranking_sums(
    rewards: Tensor,
    lengths: Tensor,
    groups: Tensor,
    pairs: Tensor,
    tied: Tensor,
    weights: Tensor,
) -> Tensor:
    """The sums of a batch, float64 [TOTAL].

    Args:
        rewards: [D].
        lengths: [D], tokens of each answer.
        groups: int64 [D], the prompt of each answer.
        pairs: int64 [2, N], better and worse answer.
        tied: bool [N], pairs that the human sees as equal; they count in Kendall's tau alone.
        weights: [P], 0 for a prompt that does not count.
    """
    r = rewards.detach().double()
    counts = (weights > 0).double()
    of_pair = groups[pairs[0]]
    strict = counts[of_pair] * (~tied).double()
    difference = r[pairs[0]] - r[pairs[1]]
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    here = [torch.stack([strict.sum(), (strict * right).sum(), (strict * difference).sum()])]

    tau, ranked = kendall_tau_b((~tied).double(), difference.sign(), of_pair, len(weights))
    known = counts * ranked.double()
    here.append(torch.stack([known.sum(), (known * tau).sum()]))

    counted = counts[groups]
    here.append(torch.stack([counted.sum(), (counted * r).sum(), (counted * r * r).sum()]))

    confidence = torch.sigmoid(difference.abs())
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    here += [
        r.new_zeros(BINS).index_add(0, place, strict * value) for value in (torch.ones_like(r[:1]), confidence, right)
    ]

    longer = lengths[pairs[0]] - lengths[pairs[1]]
    slot = torch.bucketize(longer, torch.tensor(LENGTH_EDGES, device=longer.device), right=True)
    here += [r.new_zeros(len(LENGTH_EDGES) + 1).index_add(0, slot, value) for value in (strict, strict * right)]
    return torch.cat(here)


def pair_metrics(sums: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """``accuracy``, ``margin`` and ``reward`` of a batch's sums [TOTAL], each as a sum and its count."""
    pairs, _, answers, *_ = sums.split(list(SIZES.values()))
    return {"accuracy": (pairs[1], pairs[0]), "margin": (pairs[2], pairs[0]), "reward": (answers[1], answers[0])}


def kendall_tau_b(one: Tensor, other: Tensor, of_pair: Tensor, prompts: int) -> tuple[Tensor, Tensor]:
    """Kendall's tau-b of two orders of each prompt's answers (Kendall, 1945).

    Args:
        one: float64 [N], -1, 0 or 1: which answer of each pair the first order puts higher, or neither.
        other: the same of the second order.
        of_pair: int64 [N], the prompt of each pair.
        prompts: P.

    Returns:
        tau [P], 0 where the second order tells nothing apart, and where it is known, bool [P]: where the first does.
    """

    def per_prompt(values: Tensor) -> Tensor:
        return values.new_zeros(prompts).index_add(0, of_pair, values)

    first, second = per_prompt(one.abs()), per_prompt(other.abs())
    return per_prompt(one * other) / (first * second).sqrt().clamp_min(1.0), first > 0


def measures_of(sums: Tensor) -> dict[str, Any]:
    """The measures of a data set.

    Args:
        sums: [TOTAL], added up over batches and ranks.

    Returns:
        ``pairs``, ``accuracy`` (equal scores count half), ``margin``, ``tau``, ``ece`` (expected calibration error),
        ``answers``, ``reward_mean``, ``reward_std``, and the tables ``calibration`` (per bin: pairs, mean confidence,
        accuracy) and ``by_length`` (per bin of length differences: label, pairs, accuracy). What nothing was counted
        for is None.
    """
    pairs, prompts, answers, calibration, lengths = (part.tolist() for part in sums.cpu().split(list(SIZES.values())))
    counts, confidences, rights = calibration[:BINS], calibration[BINS : 2 * BINS], calibration[2 * BINS :]
    mean = _ratio(answers[1], answers[0])
    variance = None if mean is None else max(0.0, answers[2] / answers[0] - mean**2)
    error = sum(abs(right - confidence) for right, confidence in zip(rights, confidences))
    half = len(lengths) // 2
    return {
        "pairs": int(pairs[0]),
        "accuracy": _ratio(pairs[1], pairs[0]),
        "margin": _ratio(pairs[2], pairs[0]),
        "tau": _ratio(prompts[1], prompts[0]),
        "ece": _ratio(error, pairs[0]),
        "answers": int(answers[0]),
        "reward_mean": mean,
        "reward_std": None if variance is None else math.sqrt(variance),
        "calibration": [
            {"pairs": int(n), "confidence": _ratio(confidence, n), "accuracy": _ratio(right, n)}
            for n, confidence, right in zip(counts, confidences, rights)
        ],
        "by_length": [
            {"longer_by": label, "pairs": int(n), "accuracy": _ratio(right, n)}
            for label, n, right in zip(length_labels(), lengths[:half], lengths[half:])
        ],
    }


def length_labels() -> list[str]:
    """Names of the bins of length differences."""
    edges = LENGTH_EDGES
    inner = [f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)]
    return [f"below {edges[0]}", *inner, f"{edges[-1]} and more"]


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
