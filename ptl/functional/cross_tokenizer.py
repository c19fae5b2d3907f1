"""Distillation between models of different tokenizers: from hidden states and heads to a sum over aligned groups.

Both models have read the same bytes, cut into different tokens. A group is a shortest run of student tokens
x_1..x_k and of teacher tokens y_1..y_l that begin at the same byte and end at the same byte. Before a group both
models have seen the same text, so their distributions over *what comes next there* can be compared, and only those:
inside the group their contexts differ.

**The events of a group.** One model's distribution q over its next token at the group's first position is refined at
the token that was observed::

    piece       prod_i q(x_i | x_<i)                      the bytes of the group, by the chain rule
    x_1         q(x_1) * (1 - prod_{i>1} q(x_i | x_<i))   it begins like the group and goes on otherwise
    v != x_1    q(v)

These are disjoint and sum to 1, whatever k. For k = 1 the second is 0 and the first is q(x_1): q itself, with its
observed entry apart. (TRL 1.16's GOLD multiplies a whole distribution by the probabilities of the other observed
tokens, which leaves numbers that sum to less than 1; it takes it at the group's last position, where the two contexts
differ, or in its "observed" form at the right place but one position late.)

**uld** (Boizard et al., arXiv:2402.12030, equation 5): the L1 distance between the two sides' events, each sorted from
high to low and padded with zeros. It needs no strings, and says nothing of
which token has which probability.

**hybrid**: ids whose strings are equal are compared by name, and so is the piece, whose bytes are equal by
construction. With m the events that both sides know by name and a last one that holds everything else, the loss is
the Jensen-Shannon divergence JSD(m_teacher, m_student), beta = 1/2, in nats, plus the L1 distance of the sorted rest. A
side that has the other side's single token also in its vocabulary may spell the piece in two ways: that token's
probability is counted to the piece. JSD and not KL, because what one side cannot say has probability 0 there, where KL
is infinite. With identical tokenizers it is the plain JSD.

With a temperature T both sides' logits are divided by T, the JSD is multiplied by T^2 (Hinton et al.,
arXiv:1503.02531) and the L1 by T, so that neither gradient fades as T grows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptl.functional.aligned import MatchedIds, Plan, run_groups
from ptl.functional.head import CHUNK_BYTES, Inputs, Options, handed_over

Kind = Literal["uld", "hybrid"]


class Side(NamedTuple):
    """What one model brings: the states that predict its tokens, its head, and the tokens.

    Attributes:
        hidden: [N, H]; row n predicts ``targets[n]``.
        weight: [V, H], the head cut to the true vocabulary.
        targets: int64 [N], in [0, V).
        bias: [V] or None.
        low_rank: ``(reduced [N, R], up [V, R])``, a LoRA branch on the head, or None.
        softcap: c of ``c * tanh(z / c)``, or None.
        logit_scale: factor on the logits, before the soft cap.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class CrossTokenizerLoss(NamedTuple):
    """A weighted sum over groups and what was seen on the way. Only ``total`` has a graph.

    Attributes:
        total: float32 [], sum over groups of weight * loss.
        per_group: float32 [G], unweighted losses; 0 where the teacher's numbers were not finite.
        weight: float32 [], sum of the weights of the groups that counted.
        ignored: int64 [], groups of which the teacher's numbers were not finite; they add nothing to ``total``.
    """

    total: Tensor
    per_group: Tensor
    weight: Tensor
    ignored: Tensor


def matched(student: Tensor, teacher: Tensor, student_size: int, teacher_size: int) -> MatchedIds:
    """The tables of ``MatchedIds`` from pairs of equal ids.

    Args:
        student: int64 [K], distinct.
        teacher: int64 [K], distinct.
        student_size: columns of the student's logits.
        teacher_size: columns of the teacher's logits.

    Raises:
        ValueError: the pairs are not one to one, or an id is out of range.
    """
    if student.shape != teacher.shape or student.ndim != 1:
        raise ValueError(f"{tuple(student.shape)} student ids and {tuple(teacher.shape)} teacher ids; expected pairs")
    tables, rests = [], []
    for who, ids, size, other in (
        ("student", student, student_size, teacher),
        ("teacher", teacher, teacher_size, student),
    ):
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size or len(ids.unique()) != len(ids)):
            raise ValueError(f"the {who}'s matched ids must be distinct and in [0, {size})")
        table = torch.full((size,), -1, dtype=torch.int64, device=ids.device)
        table[ids] = other
        tables.append(table)
        rests.append((table < 0).nonzero()[:, 0])
    return MatchedIds(student, teacher, rests[0], rests[1], to_student=tables[1], to_teacher=tables[0])


def fused_cross_tokenizer_loss(
    student: Side,
    teacher: Side,
    groups: Tensor,
    weights: Tensor,
    matched_ids: MatchedIds | None = None,
    *,
    kind: Kind = "hybrid",
    temperature: float = 1.0,
    chunk_groups: int | None = None,
) -> CrossTokenizerLoss:
    """Weighted sum over aligned groups of the distance between student and teacher; see the module for the maths.

    Groups go through in chunks, so that neither side's logits ever exist at once; the forward pass leaves the gradients
    of student states, head, bias and low-rank branch, exact for whatever requires them. No gradient flows to the
    teacher. Losses are float32 whatever the dtype (float64 for float64 students); the products run in the autocast
    dtype, else in the wider dtype of states and head. A row that is the second or later of its group costs only its log
    probability.

    Args:
        student: N rows, those of all groups and no others: how many there are is known without asking the device.
        teacher: M rows, likewise.
        groups: int64 [G, 4]: first row and row after the last in the student's, then in the teacher's; no row is in two
            groups, and none is empty.
        weights: [G], any finite numbers; no gradient flows to them.
        matched_ids: of the two vocabularies; required by ``hybrid``, not read by ``uld``.
        kind: the distance.
        temperature: T > 0.
        chunk_groups: groups of a chunk; None bounds a chunk of logits by bytes.

    Raises:
        ValueError: shapes do not fit, or an option is out of its range.
        RuntimeError: backward a second time through the same graph: gradients are scaled in place.
    """
    _check(student, teacher, groups, weights, matched_ids, kind, temperature, chunk_groups)
    device = student.hidden.device.type
    auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    inputs, (cap, scale) = _inputs(student, auto, temperature)
    loss_dtype = torch.float64 if inputs.hidden.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        theirs, numbers = _inputs(teacher, auto, temperature)
    plan = Plan(
        groups=groups,
        weights=weights.detach().to(loss_dtype),
        targets=student.targets,
        teacher=theirs,
        teacher_targets=teacher.targets,
        options=Options(cap, scale, 0.0, 0.0, None, False),
        teacher_options=Options(*numbers, 0.0, 0.0, None, False),
        matched=matched_ids if kind == "hybrid" else None,
        temperature=temperature,
        chunk=chunk_groups or _chunk(student.weight.shape[0], teacher.weight.shape[0], loss_dtype, device),
    )
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            total, per_group, ok = _CrossTokenizer.apply(*inputs, plan)
        else:
            total, per_group, ok, _ = run_groups(inputs, plan, (False,) * 5)
    return CrossTokenizerLoss(total, per_group, (plan.weights * ok).sum(), (~ok).sum())


class _CrossTokenizer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, reduced, up, plan):
        total, losses, ok, gradients = run_groups(
            Inputs(hidden, weight, bias, reduced, up), plan, ctx.needs_input_grad[:5]
        )
        ctx.gradients = gradients  # as in cross_entropy: handed over once, not copied
        ctx.mark_non_differentiable(losses, ok)
        return total, losses, ok

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        return *handed_over(ctx, grad_outputs[0], "fused_cross_tokenizer_loss"), None


# ---- what comes in ----


def _inputs(side: Side, auto: torch.dtype | None, temperature: float) -> tuple[Inputs, tuple[float | None, float]]:
    """One side in the dtype of its products, and its soft cap and scale with the temperature in them.

    ``c * tanh(s * z / c) / T`` is a soft cap of ``c / T`` on a scale of ``s / T``.
    """
    dtype = auto or torch.promote_types(side.hidden.dtype, side.weight.dtype)
    reduced, up = side.low_rank if side.low_rank is not None else (None, None)
    optional = [None if t is None else t.to(dtype) for t in (side.bias, reduced, up)]
    cap = None if side.softcap is None else side.softcap / temperature
    return Inputs(side.hidden.to(dtype), side.weight.to(dtype), *optional), (cap, side.logit_scale / temperature)


def _chunk(ours: int, theirs: int, dtype: torch.dtype, device: str) -> int:
    """Groups of a chunk: a sort's values and places and some five tables of each side within two chunks' bytes."""
    return max(8, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (2 * (ours + theirs) * dtype.itemsize))


def _check(
    student: Side,
    teacher: Side,
    groups: Tensor,
    weights: Tensor,
    matched_ids: MatchedIds | None,
    kind: str,
    temperature: float,
    chunk_groups: int | None,
) -> None:
    for name, side in (("student", student), ("teacher", teacher)):
        n, vocab = len(side.hidden), len(side.weight)
        if side.weight.ndim != 2 or side.hidden.shape[1:] != side.weight.shape[1:]:
            hint = " (a parameter partitioned by ZeRO-3 must be gathered first)" if side.weight.numel() == 0 else ""
            shapes = f"hidden {tuple(side.hidden.shape)} and weight {tuple(side.weight.shape)}"
            raise ValueError(f"{name} has {shapes}; expected [N, H] and [V, H]{hint}")
        if tuple(side.targets.shape) != (n,) or side.targets.dtype != torch.int64:
            raise ValueError(
                f"{name}.targets is {side.targets.dtype} {tuple(side.targets.shape)}; expected int64 {(n,)}"
            )
        if side.bias is not None and tuple(side.bias.shape) != (vocab,):
            raise ValueError(f"{name}.bias has shape {tuple(side.bias.shape)}; expected {(vocab,)}")
    if groups.ndim != 2 or groups.shape[1] != 4 or groups.dtype != torch.int64 or weights.shape != groups.shape[:1]:
        shapes = f"groups is {groups.dtype} {tuple(groups.shape)} and weights {tuple(weights.shape)}"
        raise ValueError(f"{shapes}; expected int64 [G, 4] and [G]")
    if kind not in ("uld", "hybrid"):
        raise ValueError(f"kind is {kind!r}; it must be uld or hybrid")
    if temperature <= 0.0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if chunk_groups is not None and chunk_groups < 1:
        raise ValueError(f"chunk_groups is {chunk_groups}; it must be at least 1, or None to choose it by size")
    if kind == "hybrid":
        sizes = None if matched_ids is None else (len(matched_ids.to_teacher), len(matched_ids.to_student))
        expected = (len(student.weight), len(teacher.weight))
        if sizes != expected:
            raise ValueError(f"matched_ids are of vocabularies of {sizes} tokens; hybrid needs those of {expected}")
