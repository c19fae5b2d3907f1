"""Advantages against loops: ties, missing rewards, groups of one, and whatever the ranks."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from ptl.functional.advantages import advantages_of, batch_sums_of, tells_apart

NAN = float("nan")
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.5, NAN, 2.0, -1.0, 0.25, 0.5, NAN, 0.75])


def slow(rewards, groups, baseline, scale):
    rewards, groups = rewards.tolist(), groups.tolist()
    everyone = [r for r in rewards if not math.isnan(r)]
    out = []
    for reward, group in zip(rewards, groups):
        if math.isnan(reward):
            out.append(0.0)
            continue
        own = [r for r, g in zip(rewards, groups) if g == group and not math.isnan(r)]
        others = list(own)
        others.remove(reward)
        compared = {"group": own, "leave_one_out": others, "batch": everyone, "none": [0.0]}[baseline]
        spread = {"group": own, "batch": everyone}.get(scale)
        out.append((reward - statistics.fmean(compared or [0.0])) / (statistics.stdev(spread) if spread else 1.0))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("baseline", ["group", "leave_one_out", "batch", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trap_grpo_13_advantages_are_those_of_the_loop_and_a_missing_reward_leaves_the_others(baseline, scale):
    found = advantages_of(REWARDS.double(), GROUPS, baseline=baseline, scale=scale)
    torch.testing.assert_close(found, slow(REWARDS.double(), GROUPS, baseline, scale))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -1e6, 1e-8])
def test_trap_grpo_10_equal_rewards_give_exactly_zero(dtype, baseline, scale, value):
    """Also those that were added up in another order: 0.1 + 0.2 and 0.3 differ in the last digit."""
    noise = torch.tensor([0.0, 1e-8, -1e-8, 5e-9, 0.0, 0.0, 0.0, 0.0]) * max(1.0, abs(value))
    equal = (torch.full((8,), value, dtype=dtype) + noise.to(dtype)).to(dtype)
    other = torch.tensor([1.0, 0.0], dtype=dtype)
    groups = torch.tensor([0] * 8 + [1] * 2)
    found = advantages_of(torch.cat([equal, other]), groups, baseline=baseline, scale=scale)
    assert (found[:8] == 0).all() and (found[8:] != 0).all()
    assert tells_apart(torch.cat([equal, other]), groups).tolist() == [False] * 8 + [True] * 2


def test_trap_grpo_10_sums_of_the_same_parts_in_another_order():
    rewards = torch.tensor([0.1 + 0.2, 0.3, 0.3, 0.2 + 0.1], dtype=torch.float64)
    assert rewards[0] != rewards[1]
    assert (advantages_of(rewards, torch.zeros(4, dtype=torch.int64), scale="group") == 0).all()
    assert (advantages_of(rewards, torch.zeros(4, dtype=torch.int64), baseline="batch", scale="batch") == 0).all()


@pytest.mark.parametrize("baseline, scale", [("group", "none"), ("leave_one_out", "none"), ("none", "group")])
def test_trap_grpo_10_a_group_of_one_is_refused_with_what_to_do(baseline, scale):
    with pytest.raises(ValueError, match="2 or more answers"):
        advantages_of(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1]), baseline=baseline, scale=scale)


@pytest.mark.parametrize("baseline, scale", [("batch", "batch"), ("batch", "none"), ("none", "none")])
def test_trap_grpo_10_a_group_of_one_has_an_advantage_against_the_batch(baseline, scale):
    rewards, groups = torch.tensor([1.0, 0.0, 3.0]).double(), torch.tensor([0, 1, 2])
    found = advantages_of(rewards, groups, baseline=baseline, scale=scale)
    torch.testing.assert_close(found, slow(rewards, groups, baseline, scale))


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_trap_grpo_13_one_reward_left_in_a_group_is_compared_with_nothing(baseline):
    found = advantages_of(torch.tensor([1.0, NAN, NAN, NAN, NAN]), torch.tensor([0, 0, 0, 1, 1]), baseline=baseline)
    assert (found == 0).all()


@pytest.mark.parametrize("missing", [NAN, math.inf, -math.inf])
def test_trap_grpo_13_what_is_not_finite_is_no_reward(missing):
    rewards = torch.tensor([1.0, 0.0, missing])
    found = advantages_of(rewards, torch.zeros(3, dtype=torch.int64), scale="group")
    torch.testing.assert_close(found, torch.tensor([2**-0.5, -(2**-0.5), 0.0], dtype=torch.float64))


@pytest.mark.parametrize("ranks", [[[0, 1, 2]], [[0], [1], [2]], [[0, 2], [1]]])
@pytest.mark.parametrize("baseline, scale", [("group", "group"), ("group", "batch"), ("batch", "batch")])
def test_trap_grpo_10_advantages_are_the_same_whatever_the_ranks(ranks, baseline, scale):
    """Whole groups on a rank, and the batch's sums added up over ranks."""
    alone = advantages_of(REWARDS, GROUPS, baseline=baseline, scale=scale)
    owned = [torch.isin(GROUPS, torch.tensor(groups)) for groups in ranks]
    sums = sum(batch_sums_of(REWARDS[own]) for own in owned)
    for own in owned:
        found = advantages_of(REWARDS[own], GROUPS[own], baseline=baseline, scale=scale, batch_sums=sums)
        torch.testing.assert_close(found, alone[own])


def test_trap_grpo_10_groups_are_named_and_need_not_lie_together():
    """Two prompts of the same words are two groups; answers may be mixed."""
    mixed = torch.tensor([7, 3, 10, 0, 5, 1, 8, 4, 2, 9, 6])
    names = torch.tensor([40, -3, 1000])[GROUPS]
    found = advantages_of(REWARDS[mixed], names[mixed], scale="group")
    torch.testing.assert_close(found, advantages_of(REWARDS, GROUPS, scale="group")[mixed])


@pytest.mark.parametrize("seed", range(3))
def test_advantages_of_a_group_add_up_to_nothing(seed):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(12) % 3
    for baseline in ("group", "leave_one_out"):
        found = advantages_of(rewards, groups, baseline=baseline)
        sums = torch.zeros(3, dtype=torch.float64).index_add(0, groups, found)
        torch.testing.assert_close(sums, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    leave = advantages_of(rewards, groups, baseline="leave_one_out")
    torch.testing.assert_close(leave, advantages_of(rewards, groups) * 4 / 3)


def test_the_noise_of_near_ties_is_not_blown_up():
    rewards = torch.tensor([0.5, 0.5 + 1e-5], dtype=torch.float64)
    found = advantages_of(rewards, torch.zeros(2, dtype=torch.int64), scale="group")
    assert 0 < float(found.abs().max()) < 0.1


def test_no_answers_at_all():
    empty = torch.zeros(0)
    for scale in ("group", "batch", "none"):
        assert advantages_of(empty, empty.long(), scale=scale).shape == (0,)
    assert tells_apart(empty, empty.long()).shape == (0,)
