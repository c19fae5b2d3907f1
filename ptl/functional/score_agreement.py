"""How far two scorers put answers in the same order, and whether the best answer of several comes first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptl.functional.ranking_measures import kendall_tau_b


def score_agreement(before: Tensor, after: Tensor, groups: Tensor, pairs: Tensor) -> dict[str, Any]:
    """Agreement of two scorers on all pairs of answers to a prompt.

    Args:
        before: [D], scores of the first.
        after: [D], scores of the second.
        groups: int64 [D], the prompt of each answer, from 0.
        pairs: int64 [2, N], every pair of answers of one prompt, once.

    Returns:
        ``pairs`` that ``before`` tells apart; ``pair_agreement``, the share of these in the same order after, where a
        tie after is half; ``kendall_tau_b``, the mean over prompts; ``mean_shift``, after less before; ``new_ties``,
        pairs told apart before and not after, and ``ties_before``; ``largest_change`` of a score. What nothing was
        counted for is None.
    """
    old, new = before.double(), after.double()
    one, other = (scores[pairs[0]].sub(scores[pairs[1]]).sign() for scores in (old, new))
    told = one != 0
    count = int(told.sum())
    right = (one == other)[told].double() + 0.5 * (other == 0)[told].double()
    prompts = int(groups.max()) + 1 if groups.numel() else 0
    # A scorer that tells nothing apart where the first one does agrees with nothing: 0, not unknown.
    tau, known = kendall_tau_b(one, other, groups[pairs[0]], prompts)
    change = new - old
    return {
        "answers": old.numel(),
        "pairs": count,
        "pair_agreement": float(right.mean()) if count else None,
        "kendall_tau_b": float(tau[known].mean()) if bool(known.any()) else None,
        "mean_shift": float(change.mean()) if old.numel() else None,
        "largest_change": float(change.abs().max()) if old.numel() else None,
        "ties_before": int((~told).sum()),
        "new_ties": int((told & (other == 0)).sum()),
    }


def best_of(scores: Tensor, ranks: Tensor) -> float | None:
    """Whether the answer that scores highest is one of the best ranked, in [0, 1]; a shared first place is split.

    Args:
        scores: [K].
        ranks: [K], lower is better; NaN takes no part.

    Returns:
        None where the ranks tell no two answers apart.
    """
    ranked = torch.isfinite(ranks)
    kept, order = scores[ranked], ranks[ranked]
    if not order.numel() or bool((order == order[0]).all()):
        return None
    first = kept == kept.max()
    return float((order[first] == order.min()).double().mean())
