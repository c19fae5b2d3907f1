"""What is kept of a distribution, against slow references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptl.data.teacher_cache import rescaled
from ptl.rollout.sampling import draw, uniforms
from ptl.synth import distributions
from ptl.synth.distributions import counted, losses, top_k, usable


def some(rows=6, vocab=40, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(rows, vocab, generator=generator), -1)


def test_the_tail_is_exact_where_one_minus_the_head_is_lost():
    z = torch.full((1, 1000), -20.0)
    z[0, 7] = 20.0
    kept = top_k(torch.log_softmax(z, -1), 1)
    assert kept.ids.item() == 7
    assert kept.tail.item() == pytest.approx(np.log(999) - 40, abs=1e-4)


def test_whole_vocabulary_has_no_tail():
    kept = top_k(some(), 40)
    assert kept.tail.eq(float("-inf")).all() and torch.allclose(
        kept.logprobs.float().exp().sum(-1), torch.ones(6), 1e-3
    )


def test_sample_is_unbiased():
    logp = some(rows=1, vocab=9, scale=1.5)
    p = logp.exp()[0].double()
    estimates, n = [], 16
    for row in range(4000):
        distinct, ids, counts = counted(draw(logp, uniforms(3, row, 1, n)).numpy())
        assert distinct[0] == len(ids) and counts.sum() == n
        estimates.append(torch.zeros(9, dtype=torch.float64).index_add_(0, torch.tensor(ids), torch.tensor(counts / n)))
    stacked = torch.stack(estimates)
    error = (p * (1 - p) / (n * len(stacked))).sqrt()
    assert ((stacked.mean(0) - p).abs() < 4 * error).all()
    assert torch.allclose(stacked.var(0), p * (1 - p) / n, rtol=0.2, atol=1e-6)


def test_draws_depend_on_seed_and_row_alone():
    assert torch.equal(uniforms(1, 5, 3, 4), uniforms(1, 5, 3, 4))
    assert not torch.equal(uniforms(1, 5, 3, 4), uniforms(1, 6, 3, 4))
    assert not torch.equal(uniforms(2, 5, 3, 4), uniforms(1, 5, 3, 4))
    assert torch.equal(uniforms(1, 5, 2, 4), uniforms(1, 5, 3, 4)[:2])


def test_an_excluded_id_is_never_drawn():
    logp = torch.log_softmax(torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]), -1)
    edges = torch.tensor([[0.0, 0.2689, 0.5, 1 - 2**-53]], dtype=torch.float64)
    assert set(draw(logp, edges)[0].tolist()) == {1, 3}
    kept = top_k(logp, 3)
    assert kept.logprobs[0, 2] == float("-inf") and usable(logp).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_without_numbers_are_told(bad):
    z = torch.zeros(3, 8)
    z[1, 4] = bad
    z[2] = float("-inf")
    assert usable(torch.log_softmax(z, -1)).tolist() == [True, False, False]


def test_losses_against_slow_loops():
    logp = some(rows=4, vocab=30)
    got = losses(logp, [5], [7])
    kl = gradient = cut = 0.0
    for row in logp.double():
        p = row.exp()
        ids = p.argsort(descending=True)[:5].tolist()
        kept = top_k(row.float()[None], 5)
        stored = rescaled(kept.logprobs.float(), kept.tail).double().exp()[0]
        tail = 1 - sum(p[i] for i in ids)
        guess = torch.full_like(p, float(tail) / 25)
        alone = torch.zeros_like(p)
        for at, i in enumerate(ids):
            guess[i] = stored[at]
            alone[i] = p[i] / (1 - tail)
        kl += float(sum(p[i] * (p[i] / guess[i]).log() for i in range(30)))
        gradient += float((guess - p).square().sum().sqrt())
        cut += float((alone - p).square().sum().sqrt())
    assert got["topk"][5]["kl"] == pytest.approx(kl, rel=1e-4)
    assert got["topk"][5]["gradient"] == pytest.approx(gradient, rel=1e-4)
    assert got["topk"][5]["cut"] == pytest.approx(cut, rel=1e-4)
    draws = torch.stack([draw(logp, uniforms(0, i, 4, 7)) for i in range(3000)])
    shares = torch.nn.functional.one_hot(draws, 30).double().mean(2)
    mse = (shares - logp.exp()).square().sum(-1).mean(0)
    assert got["sample"][7]["gradient"] == pytest.approx(float(mse.sqrt().sum()), rel=0.02)
    distinct = (shares > 0).sum(-1).double().mean(0).sum()
    assert got["sample"][7]["distinct"] == pytest.approx(float(distinct), rel=0.02)


def test_float16_costs_little_of_the_divergence():
    """Measured: below 1e-6 nats a token, after the head is scaled to its exact mass."""
    got = losses(some(rows=200, vocab=2000, scale=4.0), [64], [])["topk"][64]
    assert abs(got["rounding"]) / 200 < 1e-6


def test_chunks_give_what_one_pass_gives(monkeypatch, model_folder):
    from ptl.data.batches import collate_tokens, spans_of
    from ptl.models.spec import ModelSpec
    from ptl.models.teachers import build_teacher

    model = build_teacher(ModelSpec(name=str(model_folder)))
    spans, weights = spans_of(np.array([0, 0, 1, 1, 1, 0.5], np.float32))
    row = {"ids": np.arange(5, 11), "spans": spans, "span_weights": weights, "source": 0}
    batch = collate_tokens([row, row], layout="packed", pad_id=0, window_weight=1.0)
    with torch.no_grad():
        whole = torch.cat(list(distributions.log_distributions(model, batch, vocab=350, temperature=1.5)))
        monkeypatch.setattr(distributions, "CHUNK_BYTES", 4 * 350 * 3)
        chunks = list(distributions.log_distributions(model, batch, vocab=350, temperature=1.5))
        assert [len(chunk) for chunk in chunks] == [3, 3, 2] and torch.allclose(torch.cat(chunks), whole, atol=1e-6)
        with pytest.raises(ValueError, match="table has 366 rows"):
            next(distributions.log_distributions(model, batch, vocab=367, temperature=1.0))


def test_head_bias_scale_and_soft_cap():
    from ptl.models.heads import Head

    hidden, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)
    down, up = torch.randn(2, 4), torch.randn(9, 2)
    head = Head(weight, bias, (lambda h: h @ down.T, up), softcap=2.0, logit_scale=0.5)
    want = 2.0 * torch.tanh(0.5 * (hidden @ weight.T + bias + hidden @ down.T @ up.T) / 2.0)
    assert torch.allclose(distributions._logits(head, hidden, 7), want[:, :7], atol=1e-6)
