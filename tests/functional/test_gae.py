"""Token rewards, GAE and the critic's loss against loops."""

from __future__ import annotations

import pytest
import torch

from ptl.functional.gae import generalised_advantages, token_rewards, value_loss
from ptl.functional.policy_weights import weights_of
from tests.functional.rollouts import rollout

DISCOUNT, DECAY = 0.9, 0.8


def parts(seed=0):
    t = rollout(seed).tokens
    generator = torch.Generator().manual_seed(seed + 100)
    rewards, values = (torch.randn(len(t.mask), dtype=torch.float64, generator=generator) for _ in range(2))
    bootstrap = torch.randn(t.sequences, dtype=torch.float64, generator=generator)
    bootstrap[::2] = 0.0  # these ended
    return t, rewards, values, bootstrap


def slow(t, rewards, values, bootstrap, discount, decay):
    """A_t as the sum over k of (discount decay)^k times the error of step t + k, each sequence by itself."""
    out = torch.zeros(len(t.mask), dtype=torch.float64)
    for s in range(t.sequences):
        steps = [n for n in range(len(t.mask)) if t.owners[n] == s and t.mask[n]]
        following = [values[n] for n in steps[1:]] + [bootstrap[s]]
        errors = [rewards[n] + discount * after - values[n] for n, after in zip(steps, following)]
        for i, n in enumerate(steps):
            out[n] = sum((discount * decay) ** k * error for k, error in enumerate(errors[i:]))
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("discount, decay", [(0.9, 0.8), (1.0, 0.95), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_are_those_of_the_loop_and_a_tool_is_no_action(seed, discount, decay):
    t, rewards, values, bootstrap = parts(seed)
    found = generalised_advantages(rewards, values, t.mask, t.owners, bootstrap, discount=discount, decay=decay)
    wanted = slow(t, rewards, values, bootstrap, discount, decay)
    torch.testing.assert_close(found.advantages, wanted)
    torch.testing.assert_close(found.returns, torch.where(t.mask, wanted + values, 0.0))


def test_with_decay_one_the_return_is_what_came_of_it():
    t, rewards, values, bootstrap = parts(1)
    found = generalised_advantages(rewards, values, t.mask, t.owners, bootstrap, discount=1.0, decay=1.0)
    for n in t.mask.nonzero()[:, 0].tolist():
        later = (t.owners == t.owners[n]) & t.mask & (torch.arange(len(t.mask)) >= n)
        assert float(found.returns[n]) == pytest.approx(float(rewards[later].sum() + bootstrap[t.owners[n]]))


def test_a_cut_answer_goes_on_from_the_value_of_its_last_state():
    """A critic that is right everywhere finds no advantage in a cut answer; with a bootstrap of 0 it would."""
    owners, mask = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)
    values, rewards = torch.full((3,), 2.0), torch.zeros(3)
    cut = generalised_advantages(rewards, values, mask, owners, torch.tensor([2.0]))
    assert cut.advantages.tolist() == [0.0, 0.0, 0.0]
    ended = generalised_advantages(rewards, values, mask, owners, torch.tensor([0.0]))
    assert float(ended.advantages[-1]) == -2.0


def test_token_rewards_put_the_score_at_the_last_trained_token():
    owners = torch.tensor([0, 0, 0, 1, 1, 3])
    mask = torch.tensor([True, True, False, False, False, True])
    kl = torch.tensor([0.1, 0.2, 9.0, 9.0, 9.0, -0.3])
    found = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask, owners, kl=kl, coefficient=0.5)
    torch.testing.assert_close(found, torch.tensor([-0.05, 0.9, 0.0, 0.0, 0.0, 4.15]))
    plain = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask, owners)
    torch.testing.assert_close(plain, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 4.0]))


def test_gae_refuses_what_it_cannot_mean():
    zero, on = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="discount"):
        generalised_advantages(zero, zero, on, torch.tensor([0, 1]), zero, discount=1.1)
    with pytest.raises(ValueError, match="decay"):
        generalised_advantages(zero, zero, on, torch.tensor([0, 1]), zero, decay=-0.1)
    with pytest.raises(ValueError, match="ascending"):
        generalised_advantages(zero, zero, on, torch.tensor([1, 0]), zero)


def test_nothing_sampled_at_all():
    empty = torch.zeros(0)
    found = generalised_advantages(empty, empty, empty.bool(), empty.long(), torch.zeros(3))
    assert found.advantages.shape == found.returns.shape == (0,)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_of_the_critic_is_that_of_the_loop(clip):
    t, old, returns, _ = parts(2)
    values = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    weights = weights_of("dapo", t.mask, t.owners, t.sequences)
    out = value_loss(values, old, returns, t.mask, weights, clip=clip)
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    for n in t.mask.nonzero()[:, 0].tolist():
        free = (values[n] - returns[n]) ** 2
        held = free if clip is None else (min(max(values[n], old[n] - clip), old[n] + clip) - returns[n]) ** 2
        clipped += bool(held > free)
        total = total + max(free, held) / 2
    torch.testing.assert_close(out.total, total)
    assert float(out.weight) == float(t.mask.sum()) and float(out.metrics["value_clip"][0]) == clipped
    assert clip is None or clipped
    found, wanted = (torch.autograd.grad(value, values, retain_graph=True)[0] for value in (out.total, total))
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, t.mask, weights, clip=clip).total, (values,))


def test_the_critic_is_not_moved_by_what_is_not_trained():
    t, old, returns, _ = parts(3)
    weights = weights_of("dapo", t.mask, t.owners, t.sequences)
    spoiled = torch.where(t.mask, old, float("nan")).requires_grad_()
    out = value_loss(spoiled, old, torch.where(t.mask, returns, float("inf")), t.mask, weights)
    out.total.backward()
    assert torch.isfinite(out.total) and (spoiled.grad[~t.mask] == 0).all()


def test_a_clip_that_is_not_above_zero_is_refused():
    t, old, returns, _ = parts(3)
    with pytest.raises(ValueError, match="clip"):
        value_loss(old, old, returns, t.mask, weights_of("dapo", t.mask, t.owners, t.sequences), clip=0.0)
