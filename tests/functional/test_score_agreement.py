"""Agreement of two scorers against definitions written out, and who comes first."""

import math
import random
from itertools import combinations

import pytest
import torch

from ptl.functional.score_agreement import best_of, score_agreement


def pairs_of(counts):
    groups = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    starts = [sum(counts[:i]) for i in range(len(counts))]
    pairs = [(s + i, s + j) for s, k in zip(starts, counts) for i, j in combinations(range(k), 2)]
    return groups, torch.tensor(pairs).T


def tau_b(one, other) -> float | None:
    """The definition, pair by pair (Kendall, 1945)."""
    concordant = ties_one = ties_other = total = 0
    for i, j in combinations(range(len(one)), 2):
        a, b = one[i] - one[j], other[i] - other[j]
        total += 1
        ties_one, ties_other = ties_one + (a == 0), ties_other + (b == 0)
        concordant += (a * b > 0) - (a * b < 0)
    if total == ties_one:
        return None
    return concordant / math.sqrt((total - ties_one) * (total - ties_other)) if total > ties_other else 0.0


def test_it_equals_the_definition_prompt_by_prompt():
    rng = random.Random(0)
    counts = [rng.randint(1, 6) for _ in range(40)]
    groups, pairs = pairs_of(counts)
    before = torch.tensor([float(rng.randint(0, 4)) for _ in groups])
    after = torch.tensor([float(rng.randint(0, 4)) for _ in groups])
    taus = [
        tau_b(a.tolist(), b.tolist()) for a, b in zip(before.split(counts), after.split(counts), strict=True)
    ]  # fmt: skip
    known = [tau for tau in taus if tau is not None]
    found = score_agreement(before, after, groups, pairs)
    assert 0 < len(known) < len(counts)
    assert found["kendall_tau_b"] == pytest.approx(sum(known) / len(known), abs=1e-12)
    told = [(before[i] - before[j], after[i] - after[j]) for i, j in pairs.T if before[i] != before[j]]
    right = sum(1.0 if a * b > 0 else 0.5 if b == 0 else 0.0 for a, b in told)
    assert found["pairs"] == len(told) and found["pair_agreement"] == pytest.approx(right / len(told))
    assert found["new_ties"] == sum(bool(b == 0) for _, b in told)
    assert found["ties_before"] == pairs.shape[1] - len(told)


def test_a_shift_changes_no_order_and_is_told():
    groups, pairs = pairs_of([3, 2])
    scores = torch.tensor([0.1, 0.3, 0.2, 5.0, 4.0])
    found = score_agreement(scores, scores + 2, groups, pairs)
    assert found["kendall_tau_b"] == found["pair_agreement"] == 1.0
    assert found["mean_shift"] == pytest.approx(2, abs=1e-6) and found["largest_change"] == pytest.approx(2, abs=1e-6)
    assert score_agreement(scores, -scores, groups, pairs)["kendall_tau_b"] == -1.0
    assert score_agreement(scores, torch.zeros(5), groups, pairs)["kendall_tau_b"] == 0.0
    assert score_agreement(torch.zeros(5), scores, groups, pairs)["kendall_tau_b"] is None


def test_best_of_k_is_split_where_first_places_are():
    ranks = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert best_of(torch.tensor([3.0, 1.0, 2.0, 0.0]), ranks) == 1.0
    assert best_of(torch.tensor([1.0, 3.0, 2.0, 0.0]), ranks) == 0.0
    assert best_of(torch.tensor([3.0, 3.0, 3.0, 0.0]), ranks) == pytest.approx(1 / 3)
    assert best_of(torch.tensor([0.0, 3.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0, 2.0])) == 1.0
    assert best_of(torch.tensor([9.0, 3.0, 1.0]), torch.tensor([math.nan, 1.0, 2.0])) == 1.0
    assert best_of(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])) is None
