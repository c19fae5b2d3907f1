"""Log-probabilities fused with the head: equal to the obvious ones, with a gradient for each of them."""

from __future__ import annotations

import pytest
import torch

from ptl.functional.logprobs import fused_linear_logprobs


def parts(n=13, hidden=6, vocab=29, rank=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    targets = torch.randint(vocab, (n,), generator=g)
    return make(n, hidden), make(vocab, hidden), make(vocab), make(n, rank), make(vocab, rank), targets


def naive(hidden, weight, bias, reduced, up, targets, softcap, scale):
    z = scale * (hidden @ weight.T + bias + reduced @ up.T)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_values_and_gradients_are_those_of_whole_logits(softcap, chunk):
    *tensors, targets = parts()
    hidden, weight, bias, reduced, up = tensors
    found = fused_linear_logprobs(
        hidden, weight, targets, bias=bias, low_rank=(reduced, up), softcap=softcap, logit_scale=0.7, chunk_tokens=chunk
    )
    expected = naive(*tensors, targets, softcap, 0.7)
    torch.testing.assert_close(found, expected)
    # A loss whose weights depend on the log-probabilities themselves.
    gradients = [torch.autograd.grad(torch.sigmoid(v).square().sum(), tensors) for v in (found, expected)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_gradcheck():
    *tensors, targets = parts(n=5, hidden=3, vocab=7, rank=2)
    hidden, weight, bias, reduced, up = tensors
    assert torch.autograd.gradcheck(
        lambda h, w, b, r, u: fused_linear_logprobs(h, w, targets, bias=b, low_rank=(r, u), softcap=2.0),
        (hidden, weight, bias, reduced, up),
    )


def test_a_frozen_head_gets_no_gradient_and_no_token_gives_an_empty_answer():
    hidden, weight, *_, targets = parts()
    frozen = weight.detach()
    fused_linear_logprobs(hidden, frozen, targets).sum().backward()
    assert hidden.grad is not None and frozen.grad is None
    none = fused_linear_logprobs(hidden[:0], weight, targets[:0])
    assert none.shape == (0,)
    none.sum().backward()
    assert float(weight.grad.abs().sum()) == 0.0


def test_backward_may_run_twice():
    hidden, weight, *_, targets = parts()
    logprobs = fused_linear_logprobs(hidden, weight, targets)
    first = torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0]
    second = torch.autograd.grad(logprobs.sum(), hidden)[0]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_a_foreseen_gradient_is_made_on_the_way_forward(monkeypatch, factor):
    *tensors, targets = parts()
    hidden, weight, bias, reduced, up = tensors
    weights = torch.randn(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[3] = 0.0
    how = {"bias": bias, "low_rank": (reduced, up), "softcap": 3.0, "chunk_tokens": 4}
    plain = fused_linear_logprobs(hidden, weight, targets, **how)
    expected = torch.autograd.grad((factor * weights * plain).sum(), tensors)
    found = fused_linear_logprobs(hidden, weight, targets, **how, foreseen=weights)
    assert torch.equal(found, plain)
    monkeypatch.setattr("ptl.functional.logprobs.run", None)  # nothing is computed again
    for one, other in zip(torch.autograd.grad((factor * weights * found).sum(), tensors), expected):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wrong", [0.0, 1e-3, float("nan")])
def test_a_wrong_guess_changes_nothing(wrong):
    *tensors, targets = parts()
    hidden, weight, *_ = tensors
    weights = torch.randn(13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    guess = torch.zeros_like(weights) if wrong == 0 else weights.clone()
    guess[5] += wrong
    expected = torch.autograd.grad((weights * fused_linear_logprobs(hidden, weight, targets)).sum(), tensors[:2])
    for _ in range(2):
        found = fused_linear_logprobs(hidden, weight, targets, foreseen=guess)
        for again in (True, False):
            got = torch.autograd.grad((weights * found).sum(), tensors[:2], retain_graph=again)
            for one, other in zip(got, expected):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        guess = weights  # the right one: the first pass hands over, the second makes them again


def test_refuses_shapes_that_do_not_fit():
    hidden, weight, *_, targets = parts()
    with pytest.raises(ValueError, match="targets has shape"):
        fused_linear_logprobs(hidden, weight, targets[:-1])
