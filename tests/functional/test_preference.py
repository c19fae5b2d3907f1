"""Losses on ranked answers against loops that anyone can check."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ptl.data.groups import ranked_pairs
from ptl.functional.preference import by_prompt, pair_loss, plackett_luce

NAN = float("nan")


def flat(orders):
    """Ranks [D], groups [D] and counts of prompts given as lists of ranks."""
    counts = [len(ranks) for ranks in orders]
    ranks = np.array([rank for order in orders for rank in order], np.float32)
    return ranks, torch.from_numpy(np.repeat(np.arange(len(orders)), counts)), counts


def bradley_terry(scores, orders):
    ranks, groups, counts = flat(orders)
    pairs, shares, tied = (torch.from_numpy(value) for value in ranked_pairs(ranks, counts))
    losses = pair_loss(scores[pairs[0]] - scores[pairs[1]], tied)
    return by_prompt(losses, shares.double(), groups[pairs[0]], len(orders))


def by_loop(scores, orders):
    """The mean over a prompt's pairs, written out."""
    out, begin = [], 0
    for ranks in orders:
        own = scores[begin : begin + len(ranks)]
        losses = []
        for i, j in itertools.combinations(range(len(ranks)), 2):
            if math.isnan(ranks[i]) or math.isnan(ranks[j]):
                continue
            d = own[i] - own[j]
            win, lose = -torch.sigmoid(d).log(), -torch.sigmoid(-d).log()
            losses.append(win if ranks[i] < ranks[j] else lose if ranks[i] > ranks[j] else (win + lose) / 2)
        out.append(sum(losses) / len(losses))
        begin += len(ranks)
    return torch.stack(out)


ORDERS = [[1, 2], [3, 1, 2, 2], [1, NAN, 1], [2, 1, NAN, 4, 3], [1, 1], [9, 8, 7, 6, 5, 4, 3, 2, 1]]


def test_trap_rm_kd_5_pairs_are_those_of_the_loop_ties_and_gaps_included():
    scores = torch.randn(sum(map(len, ORDERS)), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bradley_terry(scores, ORDERS), by_loop(scores, ORDERS))


def test_trap_rm_kd_5_two_answers_of_plackett_luce_are_bradley_terry():
    scores = torch.tensor([0.7, -0.3, 1.5, 1.0, -2.0, 0.1], dtype=torch.float64)
    orders = [[1, 2], [2, 1], [1, 1]]
    ranks, groups, _ = flat(orders)
    found = plackett_luce(scores, torch.from_numpy(ranks), groups, 3)
    torch.testing.assert_close(found, bradley_terry(scores, orders))
    assert found[0] == pytest.approx(math.log(1 + math.exp(-1.0)))


def test_plackett_luce_is_the_likelihood_of_the_whole_order():
    """The likelihoods of all orders of an answer set sum to 1, and one of them is the product of its choices."""
    scores = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64)
    total = 0.0
    for order in itertools.permutations(range(4)):
        ranks = torch.tensor(order, dtype=torch.float32)
        loss = plackett_luce(scores, ranks, torch.zeros(4, dtype=torch.int64), 1)
        total += math.exp(-3 * float(loss))
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_trap_rm_kd_5_the_order_in_which_answers_are_listed_does_not_matter(loss):
    scores = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    order = [2, 1, NAN, 2, 3]
    mixed = torch.tensor([4, 2, 0, 3, 1])

    def value(at):
        ranks = [order[i] for i in at.tolist()]
        if loss == "bradley_terry":
            return bradley_terry(scores[at], [ranks])
        return plackett_luce(scores[at], torch.tensor(ranks), torch.zeros(5, dtype=torch.int64), 1)

    torch.testing.assert_close(value(torch.arange(5)), value(mixed))


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_trap_rm_kd_5_nine_answers_weigh_no_more_than_two(loss):
    """With all scores equal, the loss of a prompt and the pull on its best answer do not grow with the answers."""
    sizes, pulls = [2, 9], []
    for size in sizes:
        scores = torch.zeros(size, dtype=torch.float64, requires_grad=True)
        ranks = list(range(1, size + 1))
        if loss == "bradley_terry":
            value = bradley_terry(scores, [ranks])
        else:
            value = plackett_luce(scores, torch.tensor(ranks).float(), torch.zeros(size, dtype=torch.int64), 1)
        value.sum().backward()
        pulls.append(float(scores.grad.abs().sum()))
    assert pulls[1] <= pulls[0] + 1e-12


@pytest.mark.parametrize("delta", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_trap_rm_kd_4_loss_and_gradient_are_finite_at_any_difference(delta):
    d = torch.tensor([delta], requires_grad=True)
    loss = pair_loss(d, torch.tensor([False]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(d.grad).all()
    loss = loss.detach()
    assert float(loss) >= 0
    if delta == -100.0:
        assert float(loss) == pytest.approx(100.0) and float(d.grad) == pytest.approx(-1.0)


def test_the_loss_is_positive_for_either_sign_and_falls_to_zero():
    d = torch.linspace(-20, 20, 41, dtype=torch.float64)
    loss = pair_loss(d, torch.zeros(41, dtype=torch.bool))
    assert (loss > 0).all() and (loss.diff() < 0).all() and float(loss[-1]) < 1e-8
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-d)))


def test_margin_and_label_smoothing():
    d, tied = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([False, True])
    plain = -torch.sigmoid(torch.tensor(0.25, dtype=torch.float64)).log()
    loss = pair_loss(d, tied, margins=torch.tensor([0.75, 0.75], dtype=torch.float64))
    assert float(loss[0]) == pytest.approx(float(plain))
    assert float(loss[1]) == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2)
    smoothed = pair_loss(d, tied, label_smoothing=0.1)
    expected = 0.9 * math.log1p(math.exp(-1)) + 0.1 * math.log1p(math.exp(1))
    assert float(smoothed[0]) == pytest.approx(expected)


def test_gradients_of_plackett_luce_are_those_of_its_formula():
    ranks, groups, _ = flat(ORDERS)
    scores = torch.randn(len(ranks), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, torch.from_numpy(ranks), groups, len(ORDERS)), (scores,))
