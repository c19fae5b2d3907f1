"""Hidden-state matching against a slow reference, and the map of layers."""

from __future__ import annotations

import pytest
import torch

from ptl.functional.hidden_match import hidden_match, teacher_layer

N, HS, HT = 6, 4, 7


def tensors(dtype=torch.float64, wide=HT):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(N, HS, generator=generator, dtype=dtype).requires_grad_()
    teacher = torch.randn(N, wide, generator=generator, dtype=dtype).requires_grad_()
    projection = torch.randn(wide, HS, generator=generator, dtype=dtype).requires_grad_()
    return student, teacher, torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0]), projection


def slow(student, teacher, weights, projection, kind):
    total = torch.zeros((), dtype=torch.float64)
    for s, t, w in zip(student, teacher.detach(), weights.tolist()):
        s = s if projection is None else projection @ s
        distance = ((s - t) ** 2).sum() / len(t) if kind == "mse" else 1 - (s @ t) / (s @ s).sqrt() / (t @ t).sqrt()
        total = total + w * distance
    return total


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("projected", [False, True])
def test_value_and_gradients_equal_the_slow_reference(kind, projected):
    student, teacher, weights, projection = tensors(wide=HT if projected else HS)
    leaves = [student, projection] if projected else [student]
    given = projection if projected else None
    got = hidden_match(student, teacher, weights, given, kind)
    expected = slow(student, teacher, weights, given, kind)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_gradcheck(kind):
    student, teacher, weights, projection = tensors()
    assert torch.autograd.gradcheck(lambda s, p: hidden_match(s, teacher, weights, p, kind), (student, projection))


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_law_5_no_gradient_for_the_teacher(kind):
    student, teacher, weights, projection = tensors()
    hidden_match(student, teacher, weights, projection, kind).backward()
    assert teacher.grad is None and student.grad is not None and projection.grad is not None
    assert not student.grad[1].any()  # its weight is 0


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_rows_that_do_not_count_may_hold_anything(kind):
    student, teacher, weights, projection = tensors()
    expected = hidden_match(student, teacher, weights, projection, kind)
    broken = student.detach().clone()
    broken[1] = float("nan")
    broken.requires_grad_()
    got = hidden_match(broken, teacher, weights, projection, kind)
    got.backward()
    assert torch.equal(got, expected) and broken.grad.isfinite().all()


def test_equal_states_have_no_distance_and_bfloat16_is_summed_in_float32():
    student, _, weights, _ = tensors(torch.bfloat16)
    for kind in ("cosine", "mse"):
        out = hidden_match(student, student, weights, kind=kind)
        assert out.dtype == torch.float32 and out.abs() < 1e-5
    assert hidden_match(student[:0], student[:0], weights[:0]) == 0


def test_micro_batches_add_up():
    student, teacher, weights, projection = tensors()
    parts = [hidden_match(student[p], teacher[p], weights[p], projection) for p in (slice(0, 2), slice(2, N))]
    torch.testing.assert_close(sum(parts), hidden_match(student, teacher, weights, projection))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "l1"}, "kind is 'l1'; it must be cosine or mse"),
        ({"projection": None}, "have 4 numbers and the teacher's 7: a projection is needed"),
        ({"projection": torch.zeros(HS, HT)}, r"shape \(4, 7\); expected \(7, 4\)"),
        ({"weights": torch.ones(2)}, r"expected \[N, Hs\], \[N, Ht\] and \[N\]"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(change, message):
    student, teacher, weights, projection = tensors()
    given = {"student": student, "teacher": teacher, "weights": weights, "projection": projection, **change}
    with pytest.raises(ValueError, match=message):
        hidden_match(**given)


def test_layers_map_by_depth():
    assert [teacher_layer(i, 4, 12) for i in range(5)] == [0, 3, 6, 9, 12]
    assert [teacher_layer(i, 3, 3) for i in range(4)] == [0, 1, 2, 3]
    uneven = [teacher_layer(i, 7, 30) for i in range(8)]
    assert uneven == [0, 4, 9, 13, 17, 21, 26, 30] and len(set(uneven)) == 8
    for wrong in ((5, 4, 12), (-1, 4, 12), (0, 13, 12), (0, 0, 12)):
        with pytest.raises(ValueError, match="layer"):
            teacher_layer(*wrong)
