"""Weights for what another engine sampled: against loops, by enumeration, and their measures."""

from __future__ import annotations

import pytest
import torch

from ptl.functional.importance import Importance, effective_share, importance_weights
from tests.functional.rollouts import rollout


def slow(t, how):
    out = torch.zeros(len(t.mask), dtype=torch.float64)
    for n in t.mask.nonzero()[:, 0].tolist():
        same = (t.owners == t.owners[n]) & t.mask
        log = (t.old - t.reference)[n] if how.level == "token" else (t.old - t.reference)[same].sum()
        w = float(log.exp())
        if how.method == "truncate":
            out[n] = min(w, how.high)
        else:
            out[n] = w if how.low <= w <= how.high else 0.0
    return out


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("method, low", [("truncate", 0.0), ("mask", 0.0), ("mask", 0.8)])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_the_loop(level, method, low, seed):
    t = rollout(seed).tokens  # its reference serves as the engine that sampled
    how = Importance(method=method, level=level, high=1.2, low=low)
    found = importance_weights(t.old, t.reference, t.mask, t.owners, t.sequences, how)
    wanted = slow(t, how)
    torch.testing.assert_close(found.weights, wanted)
    trained = float(t.mask.sum())
    assert all(float(weight) == trained for _, weight in found.metrics.values())
    assert float(found.metrics["weight"][0]) == pytest.approx(float(wanted.sum()))
    assert float(found.metrics["mismatch"][0]) == pytest.approx(float((t.old - t.reference).abs()[t.mask].sum()))
    assert float(found.metrics["mismatch_kl"][0]) >= 0
    unbounded = slow(t, Importance(method="truncate", level=level, high=1e9))
    outside = (unbounded > 1.2) | ((unbounded < low) & (method == "mask"))
    assert float(found.metrics["weight_clipped"][0]) == float((outside & t.mask).sum())
    assert float(found.largest) == pytest.approx(float(unbounded.max()))


def test_engines_that_agree_have_weight_one():
    t = rollout(0).tokens
    for how in (Importance(), Importance(method="mask", low=0.5), Importance(level="sequence")):
        found = importance_weights(t.old, t.old.clone(), t.mask, t.owners, t.sequences, how)
        assert (found.weights == t.mask.double()).all()
        assert float(found.metrics["mismatch"][0]) == float(found.metrics["weight_clipped"][0]) == 0.0


def test_within_its_bounds_the_weight_makes_the_gradient_that_of_the_trainer():
    """All actions enumerated: sampled from b, weighed, E[A grad l] is that under the trainer's own policy."""
    logits = torch.tensor([0.3, -0.2, 0.8], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.0, 0.4, 0.5], dtype=torch.float64).log_softmax(0)
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    lp = logits.log_softmax(0)
    every = torch.arange(3)
    w = importance_weights(lp, b, torch.ones(3, dtype=torch.bool), every, 3, Importance(high=10.0)).weights
    found = torch.autograd.grad((b.exp() * w * advantages * lp).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad((lp.exp() * advantages).sum(), logits)[0])
    assert not w.requires_grad


def test_what_is_not_trained_has_no_weight_whatever_stands_there():
    t = rollout(1).tokens
    spoiled = torch.where(t.mask, t.reference, float("-inf"))
    for level in ("token", "sequence"):
        found = importance_weights(t.old, spoiled, t.mask, t.owners, t.sequences, Importance(level=level))
        assert torch.isfinite(found.weights).all() and (found.weights[~t.mask] == 0).all()
        assert torch.isfinite(found.largest)


def test_a_long_sequence_cannot_overflow():
    n = 2000
    owners, on = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
    found = importance_weights(torch.zeros(n), torch.full((n,), -1.0), on, owners, 1, Importance(level="sequence"))
    assert (found.weights == 2.0).all() and torch.isfinite(found.largest)


def test_the_effective_share():
    assert effective_share(1.0, 1.0) == 1.0
    assert effective_share(0.25, 0.25) == 0.25  # one of four has all the weight
    assert effective_share(0.0, 0.0) == 0.0
    w = torch.tensor([1.0, 2.0, 0.5, 0.0])
    assert effective_share(float(w.mean()), float(w.square().mean())) == pytest.approx(3.5**2 / 5.25 / 4)


def test_nothing_sampled_at_all():
    empty = torch.zeros(0)
    found = importance_weights(empty, empty, empty.bool(), empty.long(), 0, Importance())
    assert found.weights.shape == (0,) and float(found.largest) == 0.0


@pytest.mark.parametrize(
    "numbers, message",
    [({"high": 0.5}, "high"), ({"method": "mask", "low": 1.5}, "low"), ({"low": 0.5}, "no lower bound")],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Importance(**numbers)
