"""Measures of rankings against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ptl.data.groups import ranked_pairs
from ptl.functional.ranking_measures import BINS, TOTAL, measures_of, ranking_sums


def sums(orders, rewards, lengths=None, weights=None):
    counts = [len(order) for order in orders]
    ranks = np.array([rank for order in orders for rank in order], np.float32)
    pairs, _, tied = (torch.from_numpy(value) for value in ranked_pairs(ranks, counts))
    groups = torch.from_numpy(np.repeat(np.arange(len(orders)), counts))
    rewards = torch.tensor(rewards)
    lengths = torch.tensor(lengths or [1] * len(ranks))
    weights = torch.tensor(weights or [1.0] * len(orders))
    return ranking_sums(rewards, lengths, groups, pairs, tied, weights)


def test_trap_rm_kd_4_equal_scores_count_half():
    assert measures_of(sums([[1, 2]], [0.5, 0.5]))["accuracy"] == 0.5
    assert measures_of(sums([[1, 2], [1, 2]], [1.0, 0.5, 0.1, 0.4]))["accuracy"] == 0.5


def test_accuracy_is_of_pairs_not_of_batches():
    """Three pairs right in one batch, one wrong in another: 3/4, where the mean of the two batches is 1/2."""
    total = sums([[1, 2, 3]], [3.0, 2.0, 1.0]) + sums([[1, 2]], [0.0, 1.0])
    assert measures_of(total)["accuracy"] == 0.75


def tau_b(ranks, rewards):
    """Kendall's tau-b, written out: (concordant - discordant) / sqrt(pairs told apart by one x by the other)."""
    agree, by_human, by_model = 0, 0, 0
    for i, j in itertools.combinations(range(len(ranks)), 2):
        human, model = np.sign(ranks[j] - ranks[i]), np.sign(rewards[i] - rewards[j])
        agree, by_human, by_model = agree + human * model, by_human + abs(human), by_model + abs(model)
    return agree / math.sqrt(by_human * by_model) if by_human * by_model else 0.0


def test_kendalls_tau_is_the_mean_over_prompts():
    rng = np.random.default_rng(0)
    orders = [rng.integers(1, 4, size).tolist() for size in (2, 3, 5, 9, 4)]
    orders = [order if len(set(order)) > 1 else [1, *order[1:-1], 2] for order in orders]
    rewards = [rng.integers(0, 5, len(order)).astype(float).tolist() for order in orders]
    taus = [tau_b(order, own) for order, own in zip(orders, rewards)]
    assert measures_of(sums(orders, [value for own in rewards for value in own]))["tau"] == pytest.approx(np.mean(taus))
    assert tau_b([1, 2, 3, 3], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(5 / math.sqrt(5 * 6))


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    rng = np.random.default_rng(1)
    deltas = rng.normal(size=500) * 2
    rewards = [value for delta in deltas for value in (float(delta), 0.0)]
    found = measures_of(sums([[1, 2]] * 500, rewards))
    confidence = 1 / (1 + np.exp(-np.abs(deltas)))
    right = deltas > 0
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    error = sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    )
    assert found["ece"] == pytest.approx(error, abs=1e-6)
    assert sum(entry["pairs"] for entry in found["calibration"]) == 500


def test_a_calibrated_model_has_a_small_error():
    rng = np.random.default_rng(2)
    deltas = rng.normal(size=4000) * 2
    wins = rng.random(4000) < 1 / (1 + np.exp(-deltas))
    rewards = [value for delta, win in zip(deltas, wins) for value in (float(delta if win else -delta), 0.0)]
    assert measures_of(sums([[1, 2]] * 4000, rewards))["ece"] < 0.03


def test_accuracy_by_length_difference():
    found = measures_of(sums([[1, 2], [1, 2], [1, 2]], [1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [100, 10, 20, 20, 10, 100]))
    by_length = {entry["longer_by"]: (entry["pairs"], entry["accuracy"]) for entry in found["by_length"]}
    assert by_length["65 and more"] == (1, 1.0)
    assert by_length["-16 to 16"] == (1, 1.0)
    assert by_length["below -64"] == (1, 0.0)
    assert by_length["17 to 64"] == (0, None)


def test_mean_and_deviation_and_what_does_not_count():
    rewards = [1.0, 2.0, 4.0, 100.0, -100.0]
    found = measures_of(sums([[1, 2, 3], [1, 2]], rewards, weights=[1.0, 0.0]))
    assert found["answers"] == 3 and found["pairs"] == 3
    assert found["reward_mean"] == pytest.approx(np.mean(rewards[:3]))
    assert found["reward_std"] == pytest.approx(np.std(rewards[:3]))


def test_sums_add_up_over_batches():
    orders, rewards = [[1, 2, 2], [2, 1], [1, 3, 2, 4]], [0.1, 0.4, -2.0, 1.0, 3.0, 0.0, 0.5, -0.5, 0.7]
    whole = sums(orders, rewards)
    parts = sums(orders[:1], rewards[:3]) + sums(orders[1:], rewards[3:])
    assert whole.shape == (TOTAL,)
    torch.testing.assert_close(whole, parts)


def test_nothing_counted_is_none():
    found = measures_of(torch.zeros(TOTAL, dtype=torch.float64))
    assert found["accuracy"] is None and found["reward_std"] is None and found["tau"] is None


def test_every_pair_of_a_prompt_is_listed_once_better_first():
    ranks = np.array([3, 1, np.nan, 2, 1], np.float32)
    pairs, shares, tied = ranked_pairs(ranks, [5])
    found = {tuple(pair) for pair in pairs.T.tolist()}
    expected = set()
    for i, j in itertools.combinations([0, 1, 3, 4], 2):
        expected.add((i, j) if ranks[i] <= ranks[j] else (j, i))
    assert found == expected and len(pairs.T) == 6
    assert tied.tolist().count(True) == 1 and np.allclose(shares, 1 / 6)
