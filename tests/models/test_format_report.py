"""What a change of format costs, against a plain loop."""

import copy
import math

import numpy as np
import pytest
import torch

from ptl.models.format_report import compare_formats
from ptl.types import Tokens
from tests import tiny


def documents(count=4):
    rng = np.random.default_rng(0)
    made = []
    for length in rng.integers(5, 30, count):
        mask = (rng.random(length) < 0.6).astype(np.float32)
        mask[0] = 0
        made.append(Tokens(rng.integers(0, 400, length).astype(np.int32), mask))
    return made


@pytest.fixture
def model():
    return tiny.make_model(seed=1, initializer_range=0.3).eval()


def test_a_model_compared_with_itself_costs_nothing(model):
    found = compare_formats(model, model, documents())
    assert found["kl"] == 0.0 and found["greedy_agreement"] == 1.0
    assert found["perplexity_before"] == found["perplexity_after"]
    assert found["tokens_per_second_after"] > 0


def test_the_measures_are_those_of_a_plain_loop(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    rows = documents()
    kl, nll, same, count = 0.0, [0.0, 0.0], 0, 0
    for row in rows:
        ids = torch.from_numpy(row.ids.astype("int64"))
        a, b = (torch.log_softmax(m(input_ids=ids[None]).logits[0].double(), -1) for m in (model, other))
        for t in range(1, len(ids)):
            if row.loss_mask[t]:
                p, q = a[t - 1].tolist(), b[t - 1].tolist()
                kl += sum(math.exp(x) * (x - y) for x, y in zip(p, q))
                nll[0] -= p[ids[t]]
                nll[1] -= q[ids[t]]
                same += p.index(max(p)) == q.index(max(q))
                count += 1
    found = compare_formats(model, other, rows)
    assert found["tokens"] == count and found["kl"] == pytest.approx(kl / count, rel=1e-6)
    assert found["perplexity_before"] == pytest.approx(math.exp(nll[0] / count), rel=1e-6)
    assert found["perplexity_after"] == pytest.approx(math.exp(nll[1] / count), rel=1e-6)
    assert found["greedy_agreement"] == pytest.approx(same / count) and found["kl"] > 0.01


def test_a_damaged_model_and_nothing_to_compare_are_refused(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(ValueError, match="the model after gives numbers that are not finite"):
        compare_formats(model, broken, documents())
    with pytest.raises(ValueError, match="no document has a trained token"):
        compare_formats(model, model, [Tokens(np.arange(4, dtype=np.int32), np.zeros(4, np.float32))])
