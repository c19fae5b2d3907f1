"""The order of units: bijective, seeded, O(1) to jump in, and the same step on any factorisation of the ranks."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest

from ptl.data.order import Plan, deal_window, permutation_keys, permute

FACTORISATIONS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (2, 1, 4), (4, 2, 1), (8, 1, 1)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection(size):
    image = permute(np.arange(size), size, permutation_keys(3, 1))
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_of_every_small_size_is_a_bijection():
    for size in range(1, 200):
        image = permute(np.arange(size), size, permutation_keys(size))
        assert sorted(image.tolist()) == list(range(size)), size


def test_permutation_is_a_fixed_function():
    """Pinned: another result would change the data order of every run that resumes."""
    assert permute(np.arange(8), 8, permutation_keys(0, 0)).tolist() == [5, 7, 4, 3, 1, 6, 0, 2]
    assert permute(np.array([0, 1, 99_999_999]), 100_000_000, permutation_keys(7, 2)).tolist() == [
        92142292,
        31083785,
        35336001,
    ]


def test_permutation_is_near_uniform():
    """Over many seeds each value reaches each place as often; chi-square of 24 degrees of freedom stays below 60."""
    size, seeds = 5, 4000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), permute(np.arange(size), size, permutation_keys(seed))] += 1
    chi = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
    assert chi < 60


@pytest.mark.parametrize("size", [1025, 5000, 10**9])
def test_feistel_spreads_neighbours_over_the_range(size):
    """Where positions 0 and 1 go, and how far apart, over many seeds: chi-square of 15 degrees of freedom."""
    seeds = 3000
    images = np.array([permute(np.arange(2), size, permutation_keys(seed)) for seed in range(seeds)])
    for values in (images[:, 0], images[:, 1], (images[:, 0] - images[:, 1]) % size):
        counts = np.bincount(values * 16 // size, minlength=16)
        assert ((counts - seeds / 16) ** 2 / (seeds / 16)).sum() < 45


def test_permutation_has_no_trend():
    size = 100_003
    image = permute(np.arange(size), size, permutation_keys(1))
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.01
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.01


def test_epochs_and_seeds_differ():
    orders = [Plan(units=1000, seed=s, epoch=e, micro_batch_size=1000).window(0) for s, e in [(0, 0), (0, 1), (1, 0)]]
    for a, b in itertools.combinations(orders, 2):
        assert (a != b).mean() > 0.9


@pytest.mark.parametrize("units", [1, 7, 8, 9, 61, 64])
def test_step_does_not_depend_on_the_factorisation(units):
    """Law 1 at the level of the plan: the same units in each optimizer step, however the window is cut."""
    steps = []
    for world, accumulate, micro in FACTORISATIONS:
        plan = Plan(units=units, seed=5, epoch=2, world_size=world, accumulate=accumulate, micro_batch_size=micro)
        real = []
        for step in range(plan.steps):
            dealt = [plan.deal(step, rank, lambda ids: ids % 11 + 1) for rank in range(world)]
            real.append(sorted(np.concatenate([d.units[d.real] for d in dealt]).tolist()))
            assert real[-1] == sorted(plan.window(step).tolist())
        steps.append(real)
    assert all(other == steps[0] for other in steps)
    assert sorted(itertools.chain(*steps[0])) == list(range(units))


@pytest.mark.parametrize("units", [1, 2, 3, 5, 7, 13, 61, 101])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_law_7_every_rank_has_the_same_number_of_batches(units, world):
    """Fewer rows than ranks, one row, prime counts: same shapes on all ranks, each unit once, the rest fillers."""
    plan = Plan(units=units, world_size=world, accumulate=3, micro_batch_size=2)
    seen = []
    for step in range(plan.steps):
        for rank in range(world):
            dealt = plan.deal(step, rank)
            assert dealt.units.shape == dealt.real.shape == (3, 2)
            assert (dealt.units >= 0).all() and (dealt.units < units).all()
            seen += dealt.units[dealt.real].tolist()
    assert sorted(seen) == list(range(units))


def test_trap_sft_14_ranks_are_disjoint_and_complete_and_resume_on_another_world():
    """Ranks 0..3 to step s, then 2 ranks with another accumulation: no unit is repeated or lost."""
    units = 1009
    first = Plan(units=units, seed=1, world_size=4, accumulate=2, micro_batch_size=3)
    stop = 17
    seen = [set(_real(first, step, rank)) for step in range(stop) for rank in range(4)]
    assert sum(map(len, seen)) == len(set().union(*seen)) == first.consumed(stop)
    rest = Plan(units=units, seed=1, world_size=2, accumulate=5, micro_batch_size=1, start=first.consumed(stop))
    later = [unit for step in range(rest.steps) for rank in range(2) for unit in _real(rest, step, rank)]
    assert len(later) == len(set(later))
    assert set(later) == set(range(units)) - set().union(*seen)
    back = Plan(units=units, seed=1, world_size=4, accumulate=2, micro_batch_size=3, start=rest.consumed(3))
    whole = Plan(units=units, seed=1, micro_batch_size=units).window(0)
    assert back.window(0).tolist() == whole[rest.consumed(3) : rest.consumed(3) + 24].tolist()


def test_law_6_exact_resume_of_the_same_plan():
    whole = Plan(units=100, seed=4, world_size=2, accumulate=2, micro_batch_size=2)
    resumed = Plan(units=100, seed=4, world_size=2, accumulate=2, micro_batch_size=2, start=whole.consumed(5))
    assert resumed.steps == whole.steps - 5
    for step in range(resumed.steps):
        for rank in range(2):
            a, b = whole.deal(step + 5, rank), resumed.deal(step, rank)
            assert a.units.tolist() == b.units.tolist() and a.real.tolist() == b.real.tolist()


def test_jump_costs_the_same_at_any_position():
    plan = Plan(units=10**12, world_size=64, micro_batch_size=4)
    tracemalloc.start()
    times = []
    for step in (10, plan.steps - 10):
        plan.window(step)
        start = time.perf_counter()
        for _ in range(20):
            plan.window(step)
        times.append(time.perf_counter() - start)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert times[1] < 5 * times[0] + 0.01


def test_deal_balances_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 0.5, 256).astype(np.int64)
    dealt = deal_window(np.arange(256), lengths, 4, 4, 16, bucket=False)
    batches = lengths[dealt.units].sum(-1)
    plain = lengths.reshape(4, 4, 16).sum(-1)
    assert np.ptp(batches) < 0.2 * np.ptp(plain)
    ranks = batches.sum(0)
    assert np.ptp(ranks) / ranks.mean() < 0.02


def test_dealing_over_accumulation_balances_ranks_of_single_units():
    dealt = deal_window(np.arange(8), np.array([8, 7, 6, 5, 4, 3, 2, 1]), 2, 4, 1, bucket=False)
    assert dealt.units[..., 0].tolist() == [[0, 1], [3, 2], [4, 5], [7, 6]]


def test_bucket_keeps_padding_small():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 1000, 128)
    for bucket, least in ((True, 0.9), (False, 0.0)):
        dealt = deal_window(np.arange(128), lengths, 2, 8, 8, bucket=bucket)
        sizes = lengths[dealt.units]
        used = sizes.sum() / (sizes.max(-1) * sizes.shape[-1]).sum()
        assert used > least
        assert sorted(dealt.units.reshape(-1).tolist()) == list(range(128))


def test_filler_is_the_shortest_unit():
    dealt = deal_window(np.array([5, 6, 7]), np.array([9, 2, 4]), 2, 1, 4, bucket=False)
    assert set(dealt.units[~dealt.real].tolist()) == {6}
    assert int(dealt.real.sum()) == 3


def test_no_shuffle_keeps_the_order():
    assert Plan(units=10, micro_batch_size=4, shuffle=False).window(1).tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "bad", [{"world_size": 0}, {"accumulate": 0}, {"micro_batch_size": -1}, {"start": 11}, {"start": -1}]
)
def test_impossible_plans_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Plan(units=10, **bad)


def test_steps_and_ranks_outside_are_refused():
    plan = Plan(units=10, world_size=2)
    with pytest.raises(IndexError, match="step 5 of 5"):
        plan.window(5)
    with pytest.raises(IndexError, match="rank 2 of 2"):
        plan.deal(0, 2)
    with pytest.raises(ValueError, match=r"data\.seed"):
        permutation_keys(-1)


def _real(plan: Plan, step: int, rank: int) -> list[int]:
    dealt = plan.deal(step, rank)
    return dealt.units[dealt.real].tolist()


@pytest.mark.parametrize(("windows", "passes", "units"), [(1, 1, 20), (2, 1, 20), (2, 3, 20), (3, 2, 18), (4, 2, 3)])
def test_steps_of_a_rollout_are_walked_as_often_as_there_are_passes(windows, passes, units):
    plan = Plan(units=units, micro_batch_size=4, windows=windows, passes=passes)
    whole = Plan(units=units, micro_batch_size=4)
    expected = []
    for first in range(0, whole.steps, windows):
        of_rollout = [whole.window(step).tolist() for step in range(first, min(first + windows, whole.steps))]
        expected += of_rollout * passes
    assert plan.steps == plan.steps_per_epoch == whole.steps * passes
    assert [plan.window(step).tolist() for step in range(plan.steps)] == expected


@pytest.mark.parametrize(("windows", "passes", "units"), [(2, 3, 20), (3, 2, 18), (4, 2, 3)])
def test_law_6_a_plan_goes_on_within_a_rollout(windows, passes, units):
    sizes = {"units": units, "micro_batch_size": 4, "windows": windows, "passes": passes}
    plan = Plan(**sizes)
    order = [plan.window(step).tolist() for step in range(plan.steps)]
    for stop in range(plan.steps):
        start, inner = plan.after(stop)
        rest = Plan(**sizes, start=start, inner=inner)
        assert [rest.window(step).tolist() for step in range(rest.steps)] == order[stop:], stop
        assert rest.after(0) == (start, inner)
        first = rest.start + rest.locate(0).first * rest.window_size
        assert first == plan.start + plan.locate(stop).first * plan.window_size
    assert plan.after(plan.steps) == (units, 0)
