"""The loss between models of different tokenizers against a slow reference that enumerates the events of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ptl.functional.cross_tokenizer import Side, fused_cross_tokenizer_loss, matched
from tests.functional.test_cross_entropy import Again, Record

VS, VT, HS, HT, R = 9, 12, 5, 4, 2
# student 1 : teacher 1, 3 : 1, 1 : 2, 2 : 2, and 1 : 1 of a token that both know by name
GROUPS = torch.tensor([[0, 1, 0, 1], [1, 4, 1, 2], [4, 5, 2, 4], [5, 7, 4, 6], [7, 8, 6, 7]])
WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0])
TARGETS = torch.tensor([0, 7, 8, 1, 5, 6, 2, 3])
THEIRS = torch.tensor([11, 9, 10, 8, 7, 0, 4])
PAIRS = [(2, 1), (3, 4), (4, 9), (5, 6), (6, 2), (7, 3)]  # 4 -> 9 and 5 -> 6 spell whole groups as one token


@dataclass
class Case:
    student: Side
    teacher: Side
    table: object


def case(dtype=torch.float64, seed=0, scale=1.0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, grad=True):
        return (scale * torch.randn(*shape, generator=generator, dtype=dtype)).requires_grad_(grad)

    student = Side(
        make(8, HS), make(VS, HS), TARGETS, make(VS), (make(8, R), make(VS, R)), softcap=4.0, logit_scale=0.7
    )
    teacher = Side(make(7, HT, grad=False), make(VT, HT, grad=False), THEIRS, softcap=3.0)
    ours, theirs = (torch.tensor(column) for column in zip(*PAIRS))
    return Case(student, teacher, matched(ours, theirs, VS, VT))


def part(c: Case, groups: Tensor) -> tuple[Side, Side, Tensor]:
    """Some of the groups, and of both sides the rows of these alone."""
    sides, columns = [], []
    for side, (first, end) in ((c.student, groups[:, :2].unbind(1)), (c.teacher, groups[:, 2:].unbind(1))):
        rows = torch.cat([torch.arange(0), *map(torch.arange, first.tolist(), end.tolist())])
        low_rank = None if side.low_rank is None else (side.low_rank[0][rows], side.low_rank[1])
        sides.append(side._replace(hidden=side.hidden[rows], targets=side.targets[rows], low_rank=low_rank))
        ends = (end - first).cumsum(0)
        columns += [ends - (end - first), ends]
    return sides[0], sides[1], torch.stack(columns, 1)


def logits(side: Side) -> Tensor:
    z = side.hidden @ side.weight.T
    z = z if side.bias is None else z + side.bias
    z = z if side.low_rank is None else z + side.low_rank[0] @ side.low_rank[1].T
    z = z * side.logit_scale
    return z if side.softcap is None else side.softcap * torch.tanh(z / side.softcap)


def events(side: Side, first: int, end: int, temperature: float) -> tuple[list[Tensor], Tensor]:
    """Probability of each id and of the piece, one by one."""
    p = (logits(side) / temperature).softmax(-1)
    piece = p[first, side.targets[first]]
    inside = torch.ones((), dtype=p.dtype)
    for row in range(first + 1, end):
        piece, inside = piece * p[row, side.targets[row]], inside * p[row, side.targets[row]]
    by_id = list(p[first])
    by_id[side.targets[first]] = by_id[side.targets[first]] * (1 - inside) if end - first > 1 else p.new_zeros(())
    return by_id, piece


def l1(a: list[Tensor], b: list[Tensor]) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    a, b = sorted(a, key=lambda x: -x.item()), sorted(b, key=lambda x: -x.item())
    width = max(len(a), len(b))
    pairs = zip(a + [zero] * (width - len(a)), b + [zero] * (width - len(b)))
    return sum(((x - y).abs() for x, y in pairs), zero)


def slow(c: Case, kind: str, temperature: float, groups=GROUPS, weights=WEIGHTS) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for (s, s_end, t, t_end), weight in zip(groups.tolist(), weights.tolist()):
        q, piece = events(c.student, s, s_end, temperature)
        p, their_piece = events(c.teacher, t, t_end, temperature)
        torch.testing.assert_close(sum(q) + piece, torch.ones((), dtype=torch.float64))
        if kind == "uld":
            total = total + weight * temperature * l1([*q, piece], [*p, their_piece])
            continue
        for a, b in PAIRS:  # a token with the bytes of the other side's single token spells the piece
            if t_end - t == 1 and b == c.teacher.targets[t]:
                piece, q[a] = piece + q[a], q[a] * 0
            if s_end - s == 1 and a == c.student.targets[s]:
                their_piece, p[b] = their_piece + p[b], p[b] * 0
        rest = [x for i, x in enumerate(q) if i not in {a for a, _ in PAIRS}]
        their_rest = [x for i, x in enumerate(p) if i not in {b for _, b in PAIRS}]
        named = [*(q[a] for a, _ in PAIRS), piece, sum(rest)]
        their_named = [*(p[b] for _, b in PAIRS), their_piece, sum(their_rest)]
        jsd = torch.zeros((), dtype=torch.float64)
        for x, y in zip(named, their_named):
            m = (x + y) / 2
            jsd = jsd + sum(v * (v / m).log() / 2 for v in (x, y) if v.item() > 0)
        total = total + weight * (temperature**2 * jsd + temperature * l1(rest, their_rest))
    return total


def leaves(side: Side) -> list[Tensor]:
    assert side.bias is not None and side.low_rank is not None
    return [side.hidden, side.weight, side.bias, *side.low_rank]


@pytest.mark.parametrize("kind", ["uld", "hybrid"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_value_and_gradients_equal_the_slow_reference(kind, temperature, chunk):
    c = case()
    out = fused_cross_tokenizer_loss(
        c.student, c.teacher, GROUPS, WEIGHTS, c.table, kind=kind, temperature=temperature, chunk_groups=chunk
    )
    expected = slow(c, kind, temperature)
    torch.testing.assert_close(out.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((out.per_group * WEIGHTS).sum(), out.total.detach())
    assert out.weight == WEIGHTS.sum() and out.ignored == 0
    got = torch.autograd.grad(0.7 * out.total, leaves(c.student))
    for a, b in zip(got, torch.autograd.grad(0.7 * expected, leaves(c.student))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["uld", "hybrid"])
def test_gradcheck(kind):
    c = case(seed=1)

    def total(h, w, b, reduced, up):
        student = c.student._replace(hidden=h, weight=w, bias=b, low_rank=(reduced, up))
        return fused_cross_tokenizer_loss(
            student, c.teacher, GROUPS, WEIGHTS, c.table, kind=kind, temperature=1.5, chunk_groups=2
        ).total

    assert torch.autograd.gradcheck(lambda *inputs: Again.apply(total, *inputs), tuple(leaves(c.student)))


@pytest.mark.parametrize("kind", ["uld", "hybrid"])
def test_a_model_is_at_no_distance_from_itself(kind):
    c = case(torch.float32)
    ids = torch.arange(VS)
    same = torch.tensor([[0, 1, 0, 1], [1, 4, 1, 4], [4, 8, 4, 8]])
    out = fused_cross_tokenizer_loss(
        c.student, c.student, same, torch.ones(3), matched(ids, ids, VS, VS), kind=kind, temperature=2.0
    )
    out.total.backward()
    assert out.total == 0
    assert all(leaf.grad.abs().max() < 1e-6 for leaf in leaves(c.student))


def test_hybrid_with_identical_vocabularies_is_the_jsd():
    c, other = case(), case(seed=3)
    groups = torch.tensor([[i, i + 1, i, i + 1] for i in range(8)])
    ids = torch.arange(VS)
    got = fused_cross_tokenizer_loss(
        c.student, other.student, groups, torch.ones(8), matched(ids, ids, VS, VS), kind="hybrid"
    )
    q, p = logits(c.student).softmax(-1), logits(other.student).softmax(-1)
    m = (p + q) / 2
    jsd = (p * (p / m).log() + q * (q / m).log()).sum() / 2
    torch.testing.assert_close(got.total, jsd)


def test_trap_rm_kd_8_each_row_moves_its_own_group_and_no_other():
    c = case()
    base = fused_cross_tokenizer_loss(c.student, c.teacher, GROUPS, WEIGHTS, c.table).per_group
    for row in range(8):
        moved = c.student.hidden.detach().clone()
        moved[row] += 1.0
        student = c.student._replace(hidden=moved)
        changed = (fused_cross_tokenizer_loss(student, c.teacher, GROUPS, WEIGHTS, c.table).per_group - base).abs()
        owner = next(i for i, g in enumerate(GROUPS.tolist()) if g[0] <= row < g[1])
        assert changed[owner] > 1e-9 and changed.sum() == changed[owner]


def test_trap_rm_kd_8_a_later_row_counts_by_its_observed_token_alone():
    """Its state is pulled along W^T (onehot - softmax): no other entry of its distribution is compared."""
    c = case()
    student = c.student._replace(bias=None, low_rank=None, softcap=None, logit_scale=1.0)
    out = fused_cross_tokenizer_loss(*part(replace(c, student=student), GROUPS[1:2]), torch.ones(1), c.table)
    (gradient,) = torch.autograd.grad(out.total, student.hidden)
    for row, later in ((1, False), (2, True), (3, True)):
        p = (student.hidden[row] @ student.weight.T).softmax(-1)
        direction = (torch.nn.functional.one_hot(TARGETS[row], VS) - p) @ student.weight
        cosine = torch.nn.functional.cosine_similarity(gradient[row], direction, 0).abs().item()
        assert (cosine > 1 - 1e-9) == later


def test_trap_rm_kd_13_no_tensor_of_all_logits():
    n, v, chunk = 60, 300, 4
    generator = torch.Generator().manual_seed(0)
    student = Side(
        torch.randn(n, 8, generator=generator).requires_grad_(),
        torch.randn(v, 8, generator=generator).requires_grad_(),
        torch.randint(v, (n,), generator=generator),
    )
    teacher = Side(torch.randn(n, 8), torch.randn(v + 40, 8), torch.randint(v, (n,), generator=generator))
    ids = torch.arange(v - 50)
    groups = torch.tensor([[i, i + 1, i, i + 1] for i in range(n)])
    with Record() as record:
        fused_cross_tokenizer_loss(
            student, teacher, groups, torch.ones(n), matched(ids, ids, v, v + 40), kind="hybrid", chunk_groups=chunk
        ).total.backward()
    assert record.largest() <= max(chunk * (v + 42), (v + 40) * 8)
    assert record.largest() < n * v / 4


def test_trap_rm_kd_14_hard_rows_are_finite_and_bad_teacher_rows_are_counted():
    c = case(torch.float32, scale=30.0)
    plain = c.student._replace(softcap=None, logit_scale=1.0)
    bad = c.teacher.hidden.clone()
    bad[2] = float("nan")
    out = fused_cross_tokenizer_loss(plain, c.teacher._replace(hidden=bad, softcap=None), GROUPS, WEIGHTS, c.table)
    out.total.backward()
    assert out.total.isfinite() and out.ignored == 1 and out.per_group[2] == 0
    assert out.weight == WEIGHTS.sum() - WEIGHTS[2]
    assert all(leaf.grad.isfinite().all() for leaf in leaves(plain))
    assert not plain.hidden.grad[4].any()
    assert (out.per_group <= math.log(2) + 2 + 1e-5).all()


def test_law_1_micro_batches_add_up_and_no_group_is_a_zero_with_a_graph():
    c = case()
    whole = fused_cross_tokenizer_loss(c.student, c.teacher, GROUPS, WEIGHTS, c.table).total
    parts = [
        fused_cross_tokenizer_loss(*part(c, GROUPS[p]), WEIGHTS[p], c.table).total for p in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole)
    none = fused_cross_tokenizer_loss(*part(c, GROUPS[:0]), WEIGHTS[:0], c.table)
    none.total.backward()
    assert none.total == 0 and all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves(c.student))


def test_law_5_no_gradient_for_the_teacher_and_none_without_need():
    c = case()
    teacher = c.teacher._replace(
        hidden=c.teacher.hidden.clone().requires_grad_(), weight=c.teacher.weight.clone().requires_grad_()
    )
    frozen = c.student._replace(weight=c.student.weight.detach())
    fused_cross_tokenizer_loss(frozen, teacher, GROUPS, WEIGHTS, c.table).total.backward()
    assert teacher.hidden.grad is None and teacher.weight.grad is None
    assert frozen.weight.grad is None and frozen.hidden.grad is not None
    with torch.no_grad():
        assert not fused_cross_tokenizer_loss(c.student, teacher, GROUPS, WEIGHTS, c.table).total.requires_grad


def test_autocast_and_bfloat16():
    c = case(torch.float32)
    exact = fused_cross_tokenizer_loss(c.student, c.teacher, GROUPS, WEIGHTS, c.table).total
    with torch.autocast("cpu", torch.bfloat16):
        half = fused_cross_tokenizer_loss(c.student, c.teacher, GROUPS, WEIGHTS, c.table).total
    half.backward()
    assert half.dtype == torch.float32 and half != exact
    torch.testing.assert_close(half, exact, rtol=0.03, atol=0)
    assert c.student.weight.grad.dtype == torch.float32


def test_a_second_backward_is_refused():
    c = case()
    total = fused_cross_tokenizer_loss(c.student, c.teacher, GROUPS, WEIGHTS, c.table).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "kl"}, "kind is 'kl'; it must be uld or hybrid"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"chunk_groups": 0}, "chunk_groups is 0"),
        ({"matched_ids": None}, "hybrid needs those of"),
        ({"groups": GROUPS[:, :2]}, r"expected int64 \[G, 4\]"),
        ({"teacher": Side(torch.zeros(7, HT), torch.zeros(0), THEIRS)}, "partitioned by ZeRO-3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_does_not_fit_is_named(change, message):
    c = case()
    given = {"student": c.student, "teacher": c.teacher, "groups": GROUPS, "weights": WEIGHTS, "matched_ids": c.table}
    with pytest.raises(ValueError, match=message):
        fused_cross_tokenizer_loss(**{**given, **change})


def test_pairs_that_are_not_one_to_one_are_refused():
    with pytest.raises(ValueError, match="distinct"):
        matched(torch.tensor([0, 0]), torch.tensor([1, 2]), 4, 4)
    with pytest.raises(ValueError, match=r"in \[0, 4\)"):
        matched(torch.tensor([0, 1]), torch.tensor([1, 4]), 4, 4)
