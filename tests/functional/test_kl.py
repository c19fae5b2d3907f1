"""KL estimators: their gradients by enumeration of every action, and the controllers of their coefficient."""

from __future__ import annotations

import itertools

import pytest
import torch

from ptl.functional.gae import generalised_advantages, token_rewards
from ptl.functional.kl import AdaptiveKL, FixedKL, kl_loss, kl_reward

LOGITS = torch.tensor([0.3, -1.0, 0.8, 0.0, -0.4, 1.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.9, 0.1, -0.3, 0.5, -1.0, 0.2], dtype=torch.float64).log_softmax(0)
ELSEWHERE = torch.tensor([0.0, 0.5, 0.2, -0.6, 0.4, 0.1], dtype=torch.float64).log_softmax(0)


def exact(logits, forward=False):
    """KL(policy || reference), or with the roles exchanged."""
    lp = logits.log_softmax(0)
    return (REFERENCE.exp() * (REFERENCE - lp)).sum() if forward else (lp.exp() * (lp - REFERENCE)).sum()


def gradient(make, *, old=None):
    """The gradient of the expectation over the sampling policy of an estimator [V], every action enumerated."""
    logits = LOGITS.clone().requires_grad_()
    lp = logits.log_softmax(0)
    sampled_from = lp.detach() if old is None else old
    return torch.autograd.grad((sampled_from.exp() * make(lp, sampled_from)).sum(), logits)[0]


def true_gradient(forward=False):
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(exact(logits, forward), logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("old", [None, ELSEWHERE])
def test_trap_grpo_9_the_gradient_in_the_loss_is_that_of_the_divergence(estimator, old):
    """On-policy and off it."""
    found = gradient(lambda lp, o: kl_loss(lp, o, REFERENCE, estimator), old=old)
    torch.testing.assert_close(found, true_gradient())


def test_trap_grpo_9_what_peers_do_instead():
    """The table of the module: without the ratio k1 gives nothing and k3 the other divergence; k2 times it is wrong."""
    k1 = lambda lp: lp - REFERENCE  # noqa: E731
    k2 = lambda lp: k1(lp).square() / 2  # noqa: E731
    k3 = lambda lp: (-k1(lp)).exp() + k1(lp) - 1  # noqa: E731
    right, zero = true_gradient(), torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(gradient(lambda lp, o: k1(lp)), zero)
    torch.testing.assert_close(gradient(lambda lp, o: k2(lp)), right)
    torch.testing.assert_close(gradient(lambda lp, o: k3(lp)), true_gradient(forward=True))
    assert not torch.allclose(true_gradient(forward=True), right, atol=1e-2)
    assert not torch.allclose(gradient(lambda lp, o: (lp - o).exp() * k2(lp)), right, atol=1e-2)


@pytest.mark.parametrize("estimator, right", [("k1", True), ("k2", False), ("k3", False)])
def test_trap_grpo_9_as_a_reward_only_k1_is_right(estimator, right):
    """The score-function gradient E[k grad lp] of a constant reward."""
    value = {
        "k1": lambda lp: kl_reward(lp, REFERENCE),
        "k2": lambda lp: kl_reward(lp, REFERENCE).square() / 2,
        "k3": lambda lp: (-kl_reward(lp, REFERENCE)).exp() + kl_reward(lp, REFERENCE) - 1,
    }[estimator]
    found = gradient(lambda lp, o: value(lp) * lp)
    assert torch.allclose(found, true_gradient()) is right


@pytest.mark.parametrize("estimator, unbiased", [("k1", True), ("k2", False), ("k3", True)])
@pytest.mark.parametrize("old", [None, ELSEWHERE])
def test_values(estimator, unbiased, old):
    lp = LOGITS.log_softmax(0)
    o = lp if old is None else old
    value = (o.exp() * kl_loss(lp, o, REFERENCE, estimator)).sum()
    assert bool(torch.isclose(value, exact(LOGITS))) is unbiased
    if estimator == "k3":
        assert (kl_loss(lp, o, REFERENCE, estimator) >= 0).all()


def test_on_policy_k2_and_k3_have_the_same_gradient_for_every_token():
    grads = {}
    for estimator in ("k1", "k2", "k3"):
        lp = LOGITS.log_softmax(0).detach().requires_grad_()
        grads[estimator] = torch.autograd.grad(kl_loss(lp, lp.detach(), REFERENCE, estimator).sum(), lp)[0]
    torch.testing.assert_close(grads["k2"], grads["k3"])
    torch.testing.assert_close(grads["k1"], grads["k2"] + 1)


def two_steps():
    """A policy of two tokens out of three, the second one's distribution depending on the first, and a reference."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3,), (3, 3))]
    others = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3,), (3, 3))]
    return [t.requires_grad_() for t in tables], [t.log_softmax(-1) for t in others]


def test_in_the_reward_the_divergence_of_whole_sequences_falls_and_in_the_loss_that_of_visited_contexts():
    (first, second), (ref_first, ref_second) = two_steps()
    paths = list(itertools.product(range(3), range(3)))
    l1, l2 = first.log_softmax(-1), second.log_softmax(-1)
    logprobs = torch.stack([value for a, b in paths for value in (l1[a], l2[a, b])])
    reference = torch.stack([value for a, b in paths for value in (ref_first[a], ref_second[a, b])])
    owners, mask = torch.arange(18) // 2, torch.ones(18, dtype=torch.bool)
    chance = (logprobs[0::2] + logprobs[1::2]).exp()
    whole = (chance * (logprobs - reference).view(9, 2).sum(1)).sum()
    wanted = torch.autograd.grad(whole, (first, second), retain_graph=True)

    zero = torch.zeros(9, dtype=torch.float64)
    rewards = token_rewards(zero, mask, owners, kl=kl_reward(logprobs, reference), coefficient=1.0)
    nothing = torch.zeros(18, dtype=torch.float64)
    returns = generalised_advantages(rewards, nothing, mask, owners, zero, discount=1.0, decay=1.0).advantages
    weights = chance.detach().repeat_interleave(2)
    as_reward = torch.autograd.grad(-(weights * returns * logprobs).sum(), (first, second), retain_graph=True)
    torch.testing.assert_close(as_reward, wanted)

    in_loss = (weights * kl_loss(logprobs, logprobs.detach(), reference)).sum()
    found = torch.autograd.grad(in_loss, (first, second))
    torch.testing.assert_close(found[1], wanted[1])  # nothing follows the last token
    assert not torch.allclose(found[0], wanted[0], atol=1e-3)


def test_it_is_finite_where_the_policy_has_left_a_token():
    lp = torch.tensor([-95.0], requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        value = kl_loss(lp, torch.tensor([-0.1]), torch.tensor([-0.2]), estimator)
        (grads,) = torch.autograd.grad(value.sum(), lp)
        assert torch.isfinite(value).all() and torch.isfinite(grads).all()


def test_a_fixed_coefficient_stays():
    kl = FixedKL(0.1)
    kl.update(100.0, 10_000)
    assert kl.value == 0.1
    with pytest.raises(ValueError, match="0 or above"):
        FixedKL(-0.1)


def test_an_adaptive_coefficient_steers_to_its_target():
    kl = AdaptiveKL(0.1, target=6.0, horizon=1000)
    kl.update(6.0, 100)
    assert kl.value == pytest.approx(0.1)
    kl.update(6.6, 100)  # a tenth too much, a tenth of the horizon
    assert kl.value == pytest.approx(0.1 * 1.01)
    kl.update(600.0, 100)  # held at a fifth
    assert kl.value == pytest.approx(0.1 * 1.01 * 1.02)
    kl.update(0.0, 10**9)  # a batch of many horizons counts as one
    assert kl.value == pytest.approx(0.1 * 1.01 * 1.02 * 0.8)


def test_an_adaptive_coefficient_goes_on_where_it_was():
    kl, other = AdaptiveKL(0.1), AdaptiveKL(0.1)
    kl.update(9.0, 500)
    other.load_state_dict(kl.state_dict())
    for each in (kl, other):
        each.update(3.0, 500)
    assert kl.value == other.value != 0.1


@pytest.mark.parametrize("numbers", [{"coefficient": 0.0}, {"target": -1.0}, {"horizon": 0}])
def test_a_controller_refuses_numbers_out_of_range(numbers):
    with pytest.raises(ValueError, match="must be above 0"):
        AdaptiveKL(**numbers)


def test_a_divergence_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="no numbers"):
        AdaptiveKL().update(float("nan"), 8)
