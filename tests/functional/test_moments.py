"""Means, deviations and what is built on them: the same whatever the split."""

from __future__ import annotations

import math

import pytest
import torch

from ptl.functional.moments import (
    RewardNormaliser,
    explained_variance,
    explained_variance_sums,
    mean_and_std,
    moment_sums,
    whiten,
)


def numbers(n=50, seed=0, mean=3.0):
    return mean + 2 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some(n=50, seed=1):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) > 0.3


@pytest.mark.parametrize("centre", [0.0, 2.5])
def test_sums_of_parts_give_the_mean_and_deviation_of_all(centre):
    values, mask = numbers(), some()
    sums = sum(moment_sums(v, m, centre) for v, m in zip(values.split(7), mask.split(7)))
    mean, std = mean_and_std(sums, centre)
    torch.testing.assert_close((mean, std), (values[mask].mean(), values[mask].std()))


def test_what_is_not_finite_does_not_count():
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    mean, std = mean_and_std(moment_sums(values, torch.ones(4, dtype=torch.bool)))
    assert float(mean) == 2.0 and float(std) == pytest.approx(math.sqrt(2))
    assert all(float(x) == 0.0 for x in mean_and_std(torch.zeros(3)))


def test_whitening_over_ranks_is_whitening_of_the_whole_batch():
    values, mask = numbers(), some()
    sums = sum(moment_sums(v, m) for v, m in zip(values.split(20), mask.split(20)))
    white = torch.cat([whiten(v, m, sums) for v, m in zip(values.split(20), mask.split(20))])
    torch.testing.assert_close(white[mask], (values[mask] - values[mask].mean()) / values[mask].std())
    assert (white[~mask] == 0).all()
    scaled = whiten(values, mask, sums, centre=False)
    torch.testing.assert_close(scaled[mask], values[mask] / values[mask].std())


@pytest.mark.parametrize("value", [0.0, 0.3, 1e5])
def test_what_does_not_vary_whitens_to_exactly_nothing(value):
    values = torch.full((6,), value, dtype=torch.float64) + torch.tensor([0, 1e-9, -1e-9, 0, 0, 0]).double()
    mask = torch.ones(6, dtype=torch.bool)
    assert (whiten(values, mask, moment_sums(values, mask)) == 0).all()
    torch.testing.assert_close(whiten(values, mask, moment_sums(values, mask), centre=False), values)


def test_masked_junk_does_not_reach_the_rest():
    values = torch.tensor([1.0, float("nan"), 3.0])
    mask = torch.tensor([True, False, True])
    white = whiten(values, mask, moment_sums(values, mask))
    torch.testing.assert_close(white, torch.tensor([-(2**-0.5), 0.0, 2**-0.5]))


def test_explained_variance():
    returns, mask = numbers(), some()
    values = returns + numbers(seed=2, mean=0.5) / 4

    def of(v):
        sums = sum(explained_variance_sums(*parts) for parts in zip(v.split(9), returns.split(9), mask.split(9)))
        return explained_variance(sums)

    rest = (returns - values)[mask]
    assert of(values) == pytest.approx(float(1 - rest.var() / returns[mask].var()))
    assert of(returns) == pytest.approx(1.0)
    assert of(torch.full_like(returns, 17.0)) == pytest.approx(0.0)
    assert of(-returns) == pytest.approx(-3.0)
    assert explained_variance(explained_variance_sums(returns, torch.ones_like(returns), mask)) is None


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_running_normaliser_has_the_moments_of_everything_so_far(ranks):
    normaliser = RewardNormaliser()
    seen = []
    for step in range(5):
        rewards = numbers(24, seed=step, mean=1e4)
        seen.append(rewards)
        normaliser.add(sum(normaliser.sums(part) for part in rewards.chunk(ranks)))
    everything = torch.cat(seen)
    assert normaliser.count == 120
    assert normaliser.mean == pytest.approx(float(everything.mean()), rel=1e-12)
    assert normaliser.std == pytest.approx(float(everything.std()), rel=1e-9)
    torch.testing.assert_close(normaliser(everything).mean(), torch.zeros((), dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_running_normaliser_keeps_its_digits_far_from_zero():
    """And a deviation of 2 about 100 000 is no rounding."""
    normaliser = RewardNormaliser()
    for step in range(3):
        normaliser.add(normaliser.sums(1e5 + numbers(100, seed=step, mean=0.0).double()))
    assert normaliser.std == pytest.approx(2.0, rel=0.1)


def test_the_running_normaliser_goes_on_where_it_was():
    one, other = RewardNormaliser(), RewardNormaliser()
    one.add(one.sums(numbers()))
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.add(each.sums(numbers(seed=5)))
    assert one.state_dict() == other.state_dict()


def test_normalised_rewards():
    normaliser = RewardNormaliser(clip=1.5)
    assert normaliser(torch.tensor([7.0])).tolist() == [1.5]  # nothing known: mean 0, deviation 1
    normaliser.add(normaliser.sums(torch.tensor([5.0, float("nan"), 5.0])))
    assert normaliser.count == 2 and normaliser(torch.tensor([5.5])).tolist() == [0.5]  # nothing varies
    normaliser.add(normaliser.sums(torch.tensor([1.0, 9.0])))
    found = normaliser(torch.tensor([1.0, 100.0, float("nan")]))
    assert float(found[0]) == pytest.approx(-4 / math.sqrt(32 / 3)) and float(found[1]) == 1.5
    assert math.isnan(float(found[2]))
    normaliser.add(normaliser.sums(torch.zeros(0)))
    assert normaliser.count == 4
    with pytest.raises(ValueError, match="clip"):
        RewardNormaliser(clip=0.0)
