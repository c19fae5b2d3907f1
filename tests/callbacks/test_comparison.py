"""The comparison of two models equals a slow fp64 loop over tokens, for every batch and head."""

import copy
import math

import pytest
import torch

from ptl.callbacks.comparison import COLUMNS, compare_models, generation_speed, weight_bytes
from ptl.models.heads import hidden_states, shifted_targets
from ptl.types import TokenBatch
from tests import tiny
from tests.callbacks.parts import packed, padded

VOCABULARY = 390


def batches() -> list[TokenBatch]:
    """Packed and padded, with two sources, unequal weights and one batch with nothing trained."""
    first, second = packed([9, 4, 7], 15, seed=3), padded([6, 11, 3], 8, seed=4)
    first.loss_mask[0, -4:] = 2.0
    return [
        first._replace(sources=torch.tensor([0, 1, 0])),
        second._replace(sources=torch.tensor([1, 0, 0])),
        packed([5, 3], 4)._replace(loss_mask=torch.zeros(1, 8)),
    ]


@torch.no_grad()
def slow(student, teacher, given, sources: int = 2) -> torch.Tensor:
    """A document at a time, a token at a time, in float64, by the models' own logits."""
    student, teacher = (copy.deepcopy(m).double().eval() for m in (student, teacher))
    sums = torch.zeros(sources, len(COLUMNS), dtype=torch.float64)
    for batch in given:
        for document, source in enumerate(batch.sources.tolist()):
            here = batch.document_ids == document
            ids, weights = batch.input_ids[here], batch.loss_mask[here].double()
            q, p = (torch.log_softmax(m(ids[None]).logits[0, :, :VOCABULARY].double(), -1) for m in (student, teacher))
            for t in range(1, len(ids)):
                a, b, y = q[t - 1], p[t - 1], int(ids[t])
                kl = sum(math.exp(b[v]) * float(b[v] - a[v]) for v in range(VOCABULARY)) if weights[t] else 0.0
                row = [1, kl, -a[y], a.argmax() == b.argmax(), a.argmax() == y, -b[y], b.argmax() == y]
                sums[source] += weights[t] * torch.tensor([float(x) for x in row], dtype=torch.float64)
    return sums


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_sums_equal_a_loop_in_double_precision(chunk):
    student, teacher = tiny.make_model(seed=1, layers=1), tiny.make_model(408, seed=2, hidden=64, tie=False)
    with torch.no_grad():
        student.lm_head.weight *= 40  # flat distributions would hide an error
        teacher.lm_head.weight *= 40
    teacher.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 408))
    found = compare_models(student, teacher, batches(), VOCABULARY, chunk, sources=2)
    torch.testing.assert_close(found.sums, slow(student, teacher, batches()), rtol=2e-5, atol=1e-5)
    whole = found.measures()
    assert whole["weight"] == found.sums[:, 0].sum() > 20 and whole["kl"] > 0.1
    assert whole["kl"] == pytest.approx(float(found.sums[:, 1].sum() / found.sums[:, 0].sum()))
    assert whole["perplexity"] == pytest.approx(math.exp(whole["nll"]))
    own = found.measures(1)
    assert own["nll"] == pytest.approx(float(found.sums[1, 2] / found.sums[1, 0]))


def test_trap_rm_kd_14_a_model_is_no_distance_from_itself():
    model = tiny.make_model(hidden=64)
    other = copy.deepcopy(model)
    measures = compare_models(model, other, batches(), VOCABULARY, sources=2).measures()
    assert -1e-6 <= measures["kl"] <= 1e-6 and measures["agreement"] == 1.0
    again = compare_models(model, model, batches(), VOCABULARY, 5, sources=2).measures()
    assert again["kl"] == 0.0 and again["agreement"] == 1.0
    rows = compare_models(model, other, batches(), VOCABULARY, sources=2).of_teacher().measures()
    assert rows["kl"] == 0.0 and rows["agreement"] == 1.0 and rows["nll"] == pytest.approx(measures["nll"])


@torch.no_grad()
def test_trap_rm_kd_14_half_precision_models_are_compared_in_single():
    """In bf16 the log-softmax alone would be wrong by more than the KL between near models."""
    model = tiny.make_model(hidden=64).bfloat16()
    near = copy.deepcopy(model)
    with torch.no_grad():
        near.lm_head.weight += 0.01 * torch.randn_like(near.lm_head.weight)
    found = compare_models(near, model, batches(), VOCABULARY, sources=2)
    heads = {m: m.lm_head.weight[:VOCABULARY].double() for m in (model, near)}
    total = 0.0
    for batch in batches()[:2]:
        positions, _, weights = shifted_targets(batch)
        p, q = (
            torch.log_softmax(hidden_states(m.eval(), batch).flatten(0, 1)[positions].double() @ heads[m].t(), -1)
            for m in (model, near)
        )
        total += float(((p.exp() * (p - q)).sum(-1) * weights).sum())
    assert float(found.sums[:, 1].sum()) == pytest.approx(total, rel=1e-4) and total > 0


def test_trap_rm_kd_11_rows_beyond_the_vocabulary_are_padding():
    """Teacher = student with junk rows: no distance. Soft caps and scales act."""
    student = tiny.make_model(390, tie=False, seed=3)
    teacher = tiny.make_model(412, tie=False, seed=3)
    teacher.model.load_state_dict(
        {k: v for k, v in student.model.state_dict().items() if "embed" not in k}, strict=False
    )
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:390] = student.model.embed_tokens.weight
        teacher.lm_head.weight[:390] = student.lm_head.weight
        teacher.lm_head.weight[390:] = 50.0
    assert compare_models(student, teacher, batches(), 390, sources=2).measures()["kl"] == 0.0
    with torch.no_grad():
        student.lm_head.weight *= 100
        teacher.lm_head.weight[:390] = student.lm_head.weight
    teacher.config.final_logit_softcapping = 2.0
    capped = compare_models(student, teacher, batches(), 390, sources=2).measures()
    assert capped["kl"] > 0.01
    student.config.final_logit_softcapping = 2.0
    assert compare_models(student, teacher, batches(), 390, sources=2).measures()["kl"] == 0.0


def test_trap_rm_kd_13_no_logits_for_more_than_a_chunk(monkeypatch):
    largest = 0
    real = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        nonlocal largest
        out = real(x, weight, bias)
        if out.shape[-1] == VOCABULARY:
            largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    compare_models(tiny.make_model(), tiny.make_model(seed=1), batches(), VOCABULARY, 4, sources=2)
    assert largest == 4 * VOCABULARY


def test_a_ruled_out_token_costs_nothing_for_the_teacher_and_everything_for_the_student():
    student, teacher = tiny.make_model(tie=False, seed=1), tiny.make_model(tie=False, seed=2)
    teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(400))
    with torch.no_grad():
        teacher.lm_head.bias[7] = -math.inf
    given = [batch._replace(input_ids=batch.input_ids.where(batch.input_ids != 7, 8)) for batch in batches()]
    measures = compare_models(student, teacher, given, VOCABULARY, sources=2).measures()
    assert math.isfinite(measures["kl"]) and measures["kl"] > 0
    assert compare_models(teacher, student, given, VOCABULARY, sources=2).measures()["kl"] == math.inf


def test_modes_are_back_and_dropout_is_off():
    student, teacher = tiny.make_model(attention_dropout=0.5).train(), tiny.make_model(attention_dropout=0.5).train()
    student.model.layers[0].eval()
    before = [m.training for m in student.modules()]
    first, second = (compare_models(student, teacher, batches(), VOCABULARY, sources=2).sums for _ in range(2))
    assert torch.equal(first, second) and [m.training for m in student.modules()] == before


def test_without_a_teacher_only_the_student_is_measured():
    student = tiny.make_model(seed=1)
    alone = compare_models(student, None, batches(), VOCABULARY, sources=2).measures()
    both = compare_models(student, tiny.make_model(seed=2), batches(), VOCABULARY, sources=2).measures()
    assert alone["kl"] is None and alone["agreement"] is None
    assert alone["nll"] == both["nll"] and alone["correct"] == both["correct"]


def test_clear_refusals():
    model = tiny.make_model()
    with pytest.raises(ValueError, match="output head of 400 rows, and the tokenizer 500 ids"):
        compare_models(model, model, batches(), 500, sources=2)
    with pytest.raises(ValueError, match="set data.tokenizer"):
        compare_models(model, model, batches(), 100, sources=2)


def test_bytes_and_speed():
    model = tiny.make_model(tie=True)
    assert weight_bytes(model) == 4 * sum(p.numel() for p in model.parameters())
    assert weight_bytes(copy.deepcopy(model).bfloat16()) * 2 == weight_bytes(model)
    calls = []
    model.model.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    model.train()
    assert generation_speed(model, [5, 6, 7], 3) > 0
    assert len(calls) == 4 * 3 and not any(calls) and model.training
