"""Losses on scores of ranked answers: Bradley-Terry over pairs, Plackett-Luce over orders.

The better answer of a pair should score higher: with the difference d of their scores, the loss is
``-log sigmoid(d) = log(1 + exp(-d))``. It is positive for either sign of d, falls towards 0 as d grows, and is made
small. ``sigmoid(d)``, always between 0 and 1, is the modelled probability that the better one wins (Bradley and Terry,
1952).

Shape letters: D answers, N pairs, P prompts. Everything is in the dtype of the scores, which should be float32 or
wider: bfloat16 makes ties of scores that differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def pair_loss(
    differences: Tensor, tied: Tensor, *, margins: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """``-(1 - e) log sigmoid(d - m) - e log sigmoid(m - d)`` of each pair [N].

    e is ``label_smoothing``, the share of the labels that are taken to be wrong, and 1/2 for a tie: either answer is
    as likely to win. A tie has no margin.

    Args:
        differences: d [N], score of the better answer less that of the worse.
        tied: bool [N].
        margins: m [N], by how much the better one should win (Llama 2, arXiv:2307.09288, section 3.2.2); None is 0.
        label_smoothing: in [0, 0.5).
    """
    d = differences
    if margins is not None:
        d = d - torch.where(tied, torch.zeros_like(margins), margins)
    wrong = torch.where(tied, 0.5, label_smoothing).to(d.dtype)
    return -(1 - wrong) * logsigmoid(d) - wrong * logsigmoid(-d)


def plackett_luce(scores: Tensor, ranks: Tensor, groups: Tensor, prompts: int) -> Tensor:
    """The mean negative log-likelihood of a choice, for each prompt [P] (Plackett 1975; Luce 1959).

    An order of K answers is K - 1 choices: the best among all, the next among the rest, and so on;
    ``-log softmax`` of the chosen one's score over those that are not better. Their mean, so that a long order weighs
    no more than a short one. Each of several tied answers is chosen among all that are not better than it (Breslow,
    1974). With two answers it is the Bradley-Terry loss, ties included.

    Args:
        scores: [D].
        ranks: [D], lower is better; NaN takes no part.
        groups: int64 [D], the prompt of each answer.
        prompts: P.

    Returns:
        [P]; 0 for a prompt with fewer than two ranked answers.
    """
    ranked = torch.isfinite(ranks)
    # [chosen, among]: answers of the same prompt that are no better than the chosen one, itself included.
    among = (groups[:, None] == groups[None]) & ranked[:, None] & ranked[None] & (ranks[None] >= ranks[:, None])
    chosen = among.sum(1) > 1
    # What is not among gets a finite stand-in, which keeps the gradient of an empty row from being NaN.
    low = torch.finfo(scores.dtype).min
    likelihood = scores - torch.where(among, scores[None], low).logsumexp(1)
    total = scores.new_zeros(prompts).index_add(0, groups, torch.where(chosen, -likelihood, 0.0))
    count = scores.new_zeros(prompts).index_add(0, groups, chosen.to(scores.dtype))
    return total / count.clamp_min(1)


def by_prompt(pair_values: Tensor, shares: Tensor, pair_prompts: Tensor, prompts: int) -> Tensor:
    """The mean over a prompt's pairs [P] of values [N] with shares 1 / C: a prompt of many answers weighs as one.

    Averaging all pairs of a batch instead lets one prompt of nine answers outweigh thirty-five of two, and one answer
    take part in eight updates (InstructGPT, arXiv:2203.02155, section 3.5).
    """
    return pair_values.new_zeros(prompts).index_add(0, pair_prompts, pair_values * shares)
