"""Policy losses against loops, by enumeration of all actions, and whatever the split."""

from __future__ import annotations

import itertools

import pytest
import torch

from ptl.functional.policy_loss import PolicyLoss, PolicyTokens, largest_ratio, policy_loss
from ptl.functional.policy_weights import FORMS, tokens_of_groups, weights_of
from ptl.functional.sequences import last_trained, trained_lengths, without_truncated
from tests.functional.rollouts import GROUPS, LENGTHS, rollout, slow_loss, taken

KINDS = list(FORMS)
CONSTANT = 8


def loss_of(kind, **numbers):
    return PolicyLoss(kind=kind, constant=CONSTANT if kind == "dr_grpo" else None, **numbers)


def mean(out):
    return out.total / out.weight


def gradient(value, tokens):
    return torch.autograd.grad(value, tokens.logprobs, retain_graph=True)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_losses_and_gradients_are_those_of_the_loop(kind, seed):
    low, high = (0.1, 0.15) if kind != "cispo" else (0.3, 0.4)
    made = rollout(seed)
    dual = 1.3 if kind not in ("cispo",) else None
    numbers = dict(clip_low=low, clip_high=high, kl=0.1, entropy=0.02, dual_clip=dual)
    found = mean(policy_loss(made.tokens, loss_of(kind, **numbers)))
    told = slow_loss(kind, made, low=low, high=high, dual=dual, constant=CONSTANT, kl=0.1, entropy=0.02)
    torch.testing.assert_close(found, told)
    torch.testing.assert_close(gradient(found, made.tokens), gradient(told, made.tokens))


def test_the_vetted_numbers_of_each_kind():
    """A change of a default must be meant."""
    assert PolicyLoss().kind == "dapo"
    table = {kind: (form.ratio, form.weighing, form.clip_low, form.clip_high) for kind, form in FORMS.items()}
    assert table == {
        "grpo": ("token", "sequence", 0.2, 0.2),
        "dr_grpo": ("token", "constant", 0.2, 0.2),
        "dapo": ("token", "token", 0.2, 0.28),
        "bnpo": ("token", "group", 0.2, 0.2),
        "gspo": ("mean", "sequence", 3e-4, 4e-4),
        "cispo": ("token", "token", 1.0, 4.0),
        "rloo": ("sum", "sequence", 0.2, 0.2),
    }


SPLITS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[0, 1], [2, 3], [4, 5], [6, 7]],
    [[0], [1, 2, 3, 4, 5], [6, 7]],
    [[7], [3], [1], [5], [0], [2], [4], [6]],
    [[0, 3, 6], [1, 4, 7], [2, 5]],
]


@pytest.mark.parametrize("kind", KINDS)
def test_trap_grpo_11_a_window_is_one_number_however_it_is_split(kind):
    """Also where a micro-batch has nothing to train: [3] is all masked, [5] is empty; groups lie across the cuts."""
    made = rollout(1)
    loss = loss_of(kind, kl=0.05, entropy=0.01)
    whole = None
    for split in SPLITS:
        outs = [policy_loss(taken(made.tokens, part), loss) for part in split]
        value = sum(out.total for out in outs) / sum(out.weight for out in outs)
        names = outs[0].metrics
        metrics = {
            name: sum(out.metrics[name][0] for out in outs) / sum(out.metrics[name][1] for out in outs)
            for name in names
        }
        found = (value, gradient(value, made.tokens), metrics)
        whole = whole or found
        torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_trap_grpo_11_weights_are_known_before_the_forward(kind):
    """What the window is divided by comes from masks alone, and is what the micro-batches' losses carry."""
    made = rollout(2)
    t = made.tokens
    loss = loss_of(kind)
    ahead = weights_of(
        kind, t.mask, t.owners, t.sequences, constant=CONSTANT, group_tokens=tokens_of_groups(t.mask, t.owners, GROUPS)
    )
    torch.testing.assert_close(ahead.total, policy_loss(t, loss).weight)
    assert (ahead.tokens[~t.mask] == 0).all() and (ahead.tokens[t.mask] > 0).all()
    lengths = trained_lengths(t.mask, t.owners, t.sequences)
    counts = {"token": lengths.sum(), "sequence": (lengths > 0).sum(), "constant": (lengths > 0).sum(), "group": 3}
    assert float(ahead.total) == pytest.approx(float(counts[FORMS[kind].weighing]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if FORMS[kind].weighing != "constant"])
def test_a_window_of_equal_losses_has_that_loss(kind):
    """The shares add up to 1: with no drift and A = 1 everywhere, every clipped loss is -1."""
    t = rollout(3).tokens
    t = t._replace(logprobs=t.old.clone().requires_grad_(), advantages=torch.ones_like(t.old))
    found = mean(policy_loss(t, loss_of(kind)))
    wanted = -1.0 if kind != "cispo" else float(-(t.old[t.mask]).mean())
    assert float(found.detach()) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_trap_grpo_6_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(kind):
    t = rollout(4).tokens
    logprobs = t.old.float().requires_grad_()
    t = t._replace(logprobs=logprobs, old=logprobs.detach(), advantages=t.advantages.float())
    out = policy_loss(t, loss_of(kind))
    trained = float(t.mask.sum())
    assert float(out.metrics["ratio"][0]) == trained == float(out.metrics["ratio"][1])
    assert float(out.metrics["clip_low"][0]) == float(out.metrics["clip_high"][0]) == 0.0
    assert float(out.metrics["policy_kl"][0]) == 0.0
    assert float(largest_ratio(t.logprobs, t.old, t.mask)) == 1.0
    weights = loss_of(kind).weights(t.mask, t.owners, t.sequences, group_tokens=t.group_tokens).tokens.float()
    # A sum's ratio moves with each of its tokens: the sequence's own log-probability is what is reinforced.
    times = trained_lengths(t.mask, t.owners, t.sequences)[t.owners] if kind == "rloo" else 1
    torch.testing.assert_close(gradient(out.total, t), -t.advantages * weights * times)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo"])
def test_the_gradient_is_that_of_the_expected_reward(kind):
    """All actions of a softmax, each a sequence of one token, weighed by its probability: grad E[A], exactly."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0, -0.4, 1.2], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.3, -1.0], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    p = logprobs.exp()
    every = torch.arange(6)
    tokens = PolicyTokens(
        logprobs=logprobs,
        old=logprobs.detach(),
        advantages=p.detach() * rewards,
        mask=torch.ones(6, dtype=torch.bool),
        owners=every,
        sequences=6,
        group_tokens=torch.full((6,), 6),
    )
    loss = PolicyLoss(kind=kind, constant=1 if kind == "dr_grpo" else None)
    out = policy_loss(tokens, loss)
    scale = 6 if kind == "bnpo" else 1
    found = torch.autograd.grad(out.total * scale, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, -torch.autograd.grad((p * rewards).sum(), logits)[0])


@pytest.mark.parametrize("kind", ["dapo", "rloo", "gspo"])
def test_off_policy_the_ratio_makes_up_for_the_old_policy(kind):
    """Sampled from another softmax and not clipped, the gradient is still that of E[A] under the policy."""
    logits = torch.tensor([0.3, -0.2, 0.8], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.0, 0.4, 0.5], dtype=torch.float64).log_softmax(0)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logprobs = logits.log_softmax(0)
    tokens = PolicyTokens(logprobs, old, old.exp() * rewards, torch.ones(3, dtype=torch.bool), torch.arange(3), 3)
    out = policy_loss(tokens, PolicyLoss(kind=kind, clip_low=1.0, clip_high=100.0))
    found = torch.autograd.grad(out.total, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, -torch.autograd.grad((logprobs.exp() * rewards).sum(), logits)[0])


@pytest.mark.parametrize(
    "ratio, advantage, moves",
    [
        (1.25, 1.0, True),
        (1.29, 1.0, False),
        (0.5, 1.0, True),
        (0.79, -1.0, False),
        (0.81, -1.0, True),
        (4.0, -1.0, True),
    ],
)
def test_clip_higher_stops_what_went_far_enough_and_nothing_else(ratio, advantage, moves):
    logprobs = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    one = torch.ones(1, dtype=torch.bool)
    zero = torch.zeros(1, dtype=torch.int64)
    tokens = PolicyTokens(logprobs, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), one, zero, 1)
    out = policy_loss(tokens, PolicyLoss(kind="dapo"))
    assert bool(gradient(out.total, tokens)[0] != 0) is moves
    clipped = float(out.metrics["clip_low"][0] + out.metrics["clip_high"][0])
    assert clipped == float(not moves)
    assert float(out.metrics["clip_high"][0]) == float(not moves and advantage > 0)


def test_dual_clip_bounds_what_a_bad_answer_can_cost():
    logprobs = torch.tensor([10.0, 2.9, 10.0], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([-2.0, -2.0, 2.0], dtype=torch.float64)
    on = torch.ones(3, dtype=torch.bool)
    tokens = PolicyTokens(logprobs, torch.zeros(3, dtype=torch.float64), advantages, on, torch.arange(3), 3)
    out = policy_loss(tokens, PolicyLoss(kind="dapo", dual_clip=3.0))
    assert float(out.total.detach()) == pytest.approx(3.0 * 2 + 2.9 * 2 - 1.28 * 2)
    assert gradient(out.total, tokens).tolist() == pytest.approx([0.0, 5.8, 0.0])
    assert float(out.metrics["dual_clip"][0]) == 1.0


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    """Where PPO's clip would leave a rare token without gradient, CISPO gives it the bounded weight."""
    logprobs = torch.tensor([9.0], dtype=torch.float64).log().requires_grad_()
    one = torch.ones(1, dtype=torch.bool)
    zero = torch.zeros(1, dtype=torch.int64)
    tokens = PolicyTokens(logprobs, torch.zeros(1, dtype=torch.float64), torch.ones(1), one, zero, 1)
    out = policy_loss(tokens, PolicyLoss(kind="cispo"))
    assert float(gradient(out.total, tokens)) == pytest.approx(-5.0)  # the cap is 1 + 4
    assert float(gradient(policy_loss(tokens, PolicyLoss(kind="dapo")).total, tokens)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_trap_grpo_8_what_is_not_trained_changes_nothing(kind):
    """A tool's tokens, truncated sequences and whatever numbers stand there, infinite ones too."""
    made = rollout(5)
    t, loss = made.tokens, loss_of(kind, kl=0.1, entropy=0.1)
    reference = policy_loss(t, loss)
    junk = t.logprobs.detach().clone()
    junk[~t.mask] = float("-inf")
    spoiled = {name: torch.where(t.mask, getattr(t, name), float("nan")) for name in ("old", "reference", "entropy")}
    changed = t._replace(logprobs=junk.requires_grad_(), advantages=t.advantages * t.mask, **spoiled)
    out = policy_loss(changed, loss)
    torch.testing.assert_close(out.total, reference.total)
    grads = gradient(out.total, changed)
    torch.testing.assert_close(grads, gradient(reference.total, t))
    assert (grads[~t.mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_trap_grpo_8_truncated_answers_that_are_left_out_count_nowhere(kind):
    """A window with a truncated sequence masked is the window without it."""
    made = rollout(6)
    truncated = torch.zeros(8, dtype=torch.bool)
    truncated[[2, 6]] = True
    mask = without_truncated(made.tokens.mask, made.tokens.owners, truncated)
    counts = tokens_of_groups(mask, made.tokens.owners, GROUPS)
    masked = made.tokens._replace(mask=mask, group_tokens=counts)
    out = policy_loss(masked, loss_of(kind))
    rest = policy_loss(taken(masked, [0, 1, 3, 4, 5, 7]), loss_of(kind))
    torch.testing.assert_close((out.total, out.weight), (rest.total, rest.weight))


@pytest.mark.parametrize("kind", KINDS)
def test_trap_grpo_8_nothing_to_train_is_a_sum_of_zero_and_no_nan(kind):
    t = rollout(7).tokens
    out = policy_loss(t._replace(mask=torch.zeros_like(t.mask)), loss_of(kind, kl=0.1, entropy=0.1))
    assert float(out.total.detach()) == 0.0 and float(out.weight) == 0.0
    assert (gradient(out.total, t) == 0).all()
    empty = taken(t, [5])
    assert float(policy_loss(empty, loss_of(kind)).total) == 0.0


def test_trap_grpo_11_an_answer_of_advantage_zero_still_counts():
    t = rollout(0).tokens
    silent = t._replace(advantages=torch.where(t.owners == 2, 0.0, t.advantages))
    for kind in KINDS:
        assert float(policy_loss(silent, loss_of(kind)).weight) == float(policy_loss(t, loss_of(kind)).weight)


def test_the_length_bias_that_dr_grpo_removes():
    """Two wrong answers of 2 and 6 tokens: GRPO pushes a token of the long one a third as much, Dr. GRPO as much."""
    owners = torch.tensor([0] * 2 + [1] * 6)
    logprobs = torch.full((8,), -1.0, requires_grad=True)
    on = torch.ones(8, dtype=torch.bool)
    tokens = PolicyTokens(logprobs, logprobs.detach(), -torch.ones(8), on, owners, 2)
    pushes = {}
    for kind in ("grpo", "dr_grpo", "dapo"):
        grads = gradient(policy_loss(tokens, loss_of(kind)).total, tokens)
        pushes[kind] = float(grads[7] / grads[0])
    assert pushes == pytest.approx({"grpo": 1 / 3, "dr_grpo": 1.0, "dapo": 1.0})


def test_the_correction_weighs_the_policy_part_alone():
    t = rollout(8).tokens
    half = t._replace(correction=torch.full_like(t.old, 0.5))
    plain, kl = (
        policy_loss(t, PolicyLoss()).total,
        policy_loss(t, PolicyLoss(kl=0.2)).total - policy_loss(t, PolicyLoss()).total,
    )
    torch.testing.assert_close(policy_loss(half, PolicyLoss(kl=0.2)).total, 0.5 * plain + kl)


def test_a_reference_that_is_the_policy_diverges_by_exactly_nothing():
    t = rollout(9).tokens
    logprobs = t.old.float().requires_grad_()
    same = t._replace(logprobs=logprobs, old=logprobs.detach(), reference=logprobs.detach().clone())
    assert float(policy_loss(same, PolicyLoss(kl=0.1)).metrics["reference_kl"][0]) == 0.0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cispo"])
def test_gradcheck(kind):
    t = rollout(10).tokens
    loss = loss_of(kind, clip_low=0.3, clip_high=0.35, kl=0.1, entropy=0.05, dual_clip=3.0)
    assert torch.autograd.gradcheck(
        lambda lp, e: policy_loss(t._replace(logprobs=lp, entropy=e), loss).total,
        (t.logprobs, t.entropy.clone().requires_grad_()),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_stay_finite_in_16_bits_and_far_from_the_old_policy(kind):
    old = torch.tensor([-60.0, -0.01, -80.0, -0.5], dtype=torch.bfloat16)
    logprobs = torch.tensor([-0.01, -70.0, -0.1, -0.5], dtype=torch.bfloat16, requires_grad=True)
    t = PolicyTokens(
        logprobs, old, torch.tensor([1.0, -1.0, -1.0, 1.0]), torch.ones(4, dtype=torch.bool),
        torch.tensor([0, 0, 1, 1]), 2, reference=torch.tensor([-0.01, -0.01, -90.0, -0.5]),
        group_tokens=torch.tensor([4, 4]),
    )  # fmt: skip
    out = policy_loss(t, loss_of(kind, kl=0.1))
    assert out.total.dtype == torch.float32 and torch.isfinite(out.total)
    out.total.backward()
    assert torch.isfinite(logprobs.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sequence_cannot_overflow(kind):
    """The ratio of a whole answer is a product: exp(1000) is no number in float32."""
    n = 1000
    logprobs = torch.zeros(n, requires_grad=True)
    owners, on = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
    t = PolicyTokens(logprobs, torch.full((n,), -1.0), -torch.ones(n), on, owners, 1, group_tokens=torch.tensor([n]))
    out = policy_loss(t, loss_of(kind))
    assert torch.isfinite(out.total) and torch.isfinite(gradient(out.total, t)).all()
    assert all(torch.isfinite(total) for total, _ in out.metrics.values())


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"kind": "reinforce"}, "expected one of"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 0.9}, "dual_clip"),
        ({"kind": "cispo", "dual_clip": 3.0}, "cispo"),
        ({"kl": -1.0}, "kl must be"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**numbers)


def test_what_is_missing_is_named():
    t = rollout(0).tokens
    with pytest.raises(ValueError, match="reference"):
        policy_loss(t._replace(reference=None), PolicyLoss(kl=0.1))
    with pytest.raises(ValueError, match="entropy"):
        policy_loss(t._replace(entropy=None), PolicyLoss(entropy=0.1))
    with pytest.raises(ValueError, match="most tokens of an answer"):
        policy_loss(t, PolicyLoss(kind="dr_grpo"))
    with pytest.raises(ValueError, match="group_tokens"):
        policy_loss(t._replace(group_tokens=None), PolicyLoss(kind="bnpo"))


def test_sums_over_sequences():
    t = rollout(0).tokens
    lengths, last = trained_lengths(t.mask, t.owners, t.sequences), last_trained(t.mask, t.owners, t.sequences)
    starts = [0, *itertools.accumulate(LENGTHS)]
    for s in range(8):
        here = [n for n in range(starts[s], starts[s + 1]) if t.mask[n]]
        assert int(lengths[s]) == len(here) and int(last[s]) == (here[-1] if here else -1)
