"""Distillation loss fused with both LM heads: neither side's logits ever exist for all tokens at once.

Hidden states and heads of both sides go in. Tokens go through in chunks: the teacher's and the student's logits of a
chunk are made, turned into losses and into the gradient with respect to the student's logits, multiplied into the
gradients of the student's hidden states and head, and overwritten by the next chunk. So the forward pass does all the
work and the backward pass only scales, as in ``cross_entropy``.

A tile is a chunk of tokens times the whole vocabulary. Tiles that also cut the vocabulary would need both sides' logits
twice (once for the log-sum-exp, once for the gradient), 2/5 more matrix products for memory that is already a small,
constant number of bytes.

Cost for N tokens: products of 2 N V (3 Hs + Ht) operations (Hs once less where the student's head is frozen), and
about fifteen passes over each logit, two of them ``exp``, on blocks of rows that stay in the CPU's caches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptl.functional.divergence import FLOOR, Divergence, divergence_rows
from ptl.functional.head import Inputs, accumulate, block_rows, chunk_rows, cut, handed_over, project
from ptl.types import SparseTargets


class Side(NamedTuple):
    """One model's hidden states and head; the logits are ``softcap(scale * (hidden @ weight.T + bias + low rank))``.

    Attributes:
        hidden: [N, H], the states that predict the N targets.
        weight: [V', H], V' at least the vocabulary of the loss; rows beyond it are padding and are left out.
        bias: [V'] or None.
        low_rank: a LoRA branch (reduced [N, R], up [V', R]) or None.
        softcap: c of ``c * tanh(z / c)``, or None.
        logit_scale: factor on the logits, before the soft cap.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """What makes the logits, in one dtype."""
        reduced, up = self.low_rank or (None, None)
        optional = [None if t is None else t.to(dtype) for t in (self.bias, reduced, up)]
        return Inputs(self.hidden.to(dtype), self.weight.to(dtype), *optional)


class FusedDivergence(NamedTuple):
    """Weighted sums over tokens and what was seen on the way. Only ``total`` has a graph.

    Attributes:
        total: float32 [], sum of weight * ((1 - ce) * T**2 * D + ce * cross-entropy).
        divergence: float32 [], weighted sum of D, without T squared.
        nll: float32 [], weighted sum of the student's negative log-likelihoods at temperature 1; None without ``ce`` or
            ``metrics``.
        weight: float32 [], sum of the weights of all tokens.
        agreement: float32 [], weighted count of tokens whose likeliest id is the same on both sides; None without
            ``metrics``.
        bad: float32 [], tokens whose teacher row held a NaN or nothing but -inf; they add nothing to ``total``.
        token_divergence: float32 [N], D of each token.
    """

    total: Tensor
    divergence: Tensor
    nll: Tensor | None
    weight: Tensor
    agreement: Tensor | None
    bad: Tensor
    token_divergence: Tensor


class _Options(NamedTuple):
    divergence: Divergence
    ce: float
    vocabulary: int
    chunk_tokens: int | None
    metrics: bool
    compiled: bool
    softcap: float | None
    logit_scale: float


class _Rows(NamedTuple):
    """Per-token results [N]."""

    loss: Tensor
    divergence: Tensor
    bad: Tensor
    nll: Tensor | None
    agreement: Tensor | None


def fused_divergence(
    student: Side,
    teacher: Side | SparseTargets,
    targets: Tensor,
    loss_weights: Tensor,
    *,
    divergence: Divergence,
    ce: float = 0.0,
    vocabulary: int | None = None,
    chunk_tokens: int | None = None,
    metrics: bool = False,
    compiled: bool = False,
) -> FusedDivergence:
    """Weighted sum over tokens of ``(1 - ce) * T**2 * D(teacher, student) + ce * cross-entropy``.

    Softmax, divergence and losses are float32 whatever the dtype (float64 for float64 students). Gradients are exact
    and flow to the student alone. With ``SparseTargets`` the divergence is that of the kept ids and one bucket for all
    the rest, which keeps the mass of the tail right; for a sample (tail -inf everywhere) it is the forward KL with the
    sampled shares in place of p, whose gradient is unbiased (arXiv:2503.16870). A sample means nothing to the other
    divergences; it cannot be told from a distribution that leaves nothing out, so whoever reads the sample refuses it.

    A teacher's row with a NaN, or with no finite logit, carries no information: the token's weight becomes 0, in the
    divergence and in the cross-entropy, and it is counted in ``bad``. -inf at some ids is an excluded id.

    Args:
        student: the side that learns; N may be 0.
        teacher: the other side, or what was kept of it, one row a token. Its ``logprobs`` are at the temperature of
            ``divergence``.
        targets: int64 [N], in [0, vocabulary), for the cross-entropy.
        loss_weights: [N].
        divergence: which, with its temperature.
        ce: share of the plain cross-entropy at temperature 1, in [0, 1].
        vocabulary: ids that both sides share, a prefix of each side's; None takes the smaller side's rows.
        chunk_tokens: tokens of a chunk; None bounds a chunk of logits by ``head.CHUNK_BYTES``.
        metrics: also agreement and likelihood, which cost some passes over the logits.
        compiled: the element-wise work of two live sides runs in few kernels (``torch.compile``).

    Raises:
        ValueError: shapes do not fit, or an option is out of range.
        RuntimeError: backward a second time through the same graph, as in ``fused_linear_cross_entropy``.
    """
    if not 0.0 <= ce <= 1.0:
        raise ValueError(f"ce is {ce}; it must be from 0 to 1")
    sizes = [student.weight.shape[0]] + ([teacher.weight.shape[0]] if isinstance(teacher, Side) else [])
    shared = min(sizes) if vocabulary is None else vocabulary
    _check(student, teacher, targets, loss_weights, shared)
    device = student.hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dtype = autocast or torch.promote_types(student.hidden.dtype, student.weight.dtype)
    learner = student.inputs(dtype)
    weights = loss_weights.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = _Options(divergence, ce, shared, chunk_tokens, metrics, compiled, student.softcap, student.logit_scale)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learner):
            total, *rest = _Function.apply(*learner, teacher, targets, weights, autocast, options)
            rows = _Rows(*rest)
        else:
            rows, _ = _run(learner, teacher, targets, weights, autocast, options, (False,) * 5)
            total = (rows.loss * weights).sum()
    return FusedDivergence(
        total=total,
        divergence=(rows.divergence * weights).sum(),
        nll=None if rows.nll is None else (rows.nll * weights).sum(),
        weight=weights.sum(),
        agreement=None if rows.agreement is None else (rows.agreement * weights).sum(),
        bad=rows.bad.sum().to(weights.dtype),
        token_divergence=rows.divergence,
    )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, reduced, up, teacher, targets, weights, autocast, options):
        learner = Inputs(hidden, weight, bias, reduced, up)
        rows, gradients = _run(learner, teacher, targets, weights, autocast, options, ctx.needs_input_grad[:5])
        ctx.gradients = gradients  # see handed_over
        ctx.mark_non_differentiable(*(row for row in rows if row is not None))
        return (rows.loss * weights).sum(), *rows

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        return *handed_over(ctx, grad_outputs[0], "fused_divergence"), *(None,) * 5


def _run(
    whole: Inputs,
    teacher: Side | SparseTargets,
    targets: Tensor,
    weights: Tensor,
    autocast: torch.dtype | None,
    options: _Options,
    wanted: tuple[bool, ...],
) -> tuple[_Rows, list[Tensor | None]]:
    """Losses of all tokens and the gradients of their weighted sum, chunk by chunk."""
    n, vocab = len(targets), options.vocabulary
    rows = _Rows(
        loss=weights.new_empty(n),
        divergence=weights.new_empty(n),
        bad=torch.empty(n, dtype=torch.bool, device=weights.device),
        nll=weights.new_empty(n) if options.ce or options.metrics else None,
        agreement=weights.new_empty(n) if options.metrics else None,
    )
    gradients = [torch.zeros_like(t) if t is not None and want else None for t, want in zip(whole, wanted)]
    learner = cut(whole, vocab)
    d_cut = [g if g is None or i in (0, 3) else g[:vocab] for i, g in enumerate(gradients)]
    bias_sum = None if d_cut[2] is None else weights.new_zeros(vocab)
    dense = None
    if isinstance(teacher, Side):
        kind = autocast or torch.promote_types(teacher.hidden.dtype, teacher.weight.dtype)
        dense = cut(Inputs(*(None if t is None else t.detach() for t in teacher.inputs(kind))), vocab)  # pyright: ignore[reportArgumentType]
    chunk = chunk_rows(n, vocab, learner.hidden, options.chunk_tokens)
    block = block_rows(chunk, vocab, weights)
    z_all = learner.hidden.new_empty(chunk, vocab)
    y_all = None if dense is None else dense.hidden.new_empty(chunk, vocab)
    for start in range(0, n, chunk):
        here = slice(start, min(start + chunk, n))
        z = z_all[: here.stop - start]
        project(learner, here, options.logit_scale, z)
        if isinstance(teacher, Side) and dense is not None and y_all is not None:
            project(dense, here, teacher.logit_scale, y_all[: len(z)])
        for first in range(start, here.stop, block):
            part = slice(first, min(first + block, here.stop))
            inside = slice(part.start - start, part.stop - start)
            if isinstance(teacher, Side):
                assert y_all is not None
                taught: Tensor | SparseTargets = y_all[inside]
                cap = teacher.softcap
            else:
                rest = teacher.tail[part], teacher.entropy[part], teacher.whole
                cap = None
                taught = SparseTargets(teacher.ids[part], teacher.logprobs[part], *rest)
            part_rows = _Rows(*(None if row is None else row[part] for row in rows))  # pyright: ignore[reportArgumentType]
            given = targets[part], weights[part], options, part_rows, any(wanted), bias_sum
            work = _compiled_block() if options.compiled and dense is not None else _block
            work(z[inside], taught, cap, *given)
        accumulate(d_cut, learner, here, z)
    if d_cut[2] is not None and bias_sum is not None:
        d_cut[2].copy_(bias_sum)
    return rows, gradients


def _capped(logits: Tensor, dtype: torch.dtype, cap: float | None) -> Tensor:
    """The logits after the soft cap, in the dtype of the losses; in place where that is theirs."""
    values = logits.to(dtype)
    return values if cap is None else values.div_(cap).tanh_().mul_(cap)


def _probabilities(a: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(a)`` and log-sum-exp [N, 1] of rows.

    One pass of ``exp`` serves both, and a plain sum adds up pairwise, where the log-softmax of torch on the CPU is off
    by 2e-5 nats over a vocabulary of 49,152.
    """
    highest = a.amax(-1, keepdim=True)
    p = torch.sub(a, highest).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), highest + total.log_()


def _block(
    z: Tensor,
    teacher: Tensor | SparseTargets,
    cap: float | None,
    targets: Tensor,
    weights: Tensor,
    options: _Options,
    rows: _Rows,
    gradient: bool,
    bias_sum: Tensor | None,
) -> None:
    """Losses of a block of rows; leaves in ``z`` the gradient of their weighted sum for the student's unscaled logits.

    ``cap`` is the teacher's soft cap, whose logits are overwritten where they have the dtype of the losses.
    """
    t, ce = options.divergence.temperature, options.ce
    if isinstance(teacher, Tensor):
        teacher = _capped(teacher, weights.dtype, cap)
    values = _capped(z, weights.dtype, options.softcap)
    a = values if t == 1 else values / t
    q, log_total = _probabilities(a)
    plain = q
    if rows.nll is not None:
        lse = log_total
        if t != 1:
            plain, lse = _probabilities(values)
        torch.sub(lse[:, 0], values.gather(1, targets[:, None])[:, 0], out=rows.nll)
    if rows.agreement is not None:
        theirs = _likeliest(teacher)
        rows.agreement.copy_(values.gather(1, theirs)[:, 0] >= values.amax(-1))
    if isinstance(teacher, SparseTargets):
        value, d_a, bad = _sparse_rows(teacher, a - log_total, q, options.divergence)
    else:
        value, d_a, bad = _dense_rows(teacher, a, q, log_total, options.divergence)
    rows.bad.copy_(bad)
    torch.mul(value, ~bad, out=rows.divergence)
    torch.mul(rows.divergence, (1 - ce) * t * t, out=rows.loss)
    if ce and rows.nll is not None:
        rows.loss.add_(rows.nll * ~bad, alpha=ce)
    if rows.agreement is not None:
        rows.agreement.mul_(~bad)
    if not gradient:
        return
    factor = weights * options.logit_scale * ~bad
    d_a.mul_(((1 - ce) * t * factor)[:, None])  # T squared of the loss over the T of a = z / T
    if ce:
        d_a.addcmul_(plain, (ce * factor)[:, None])
        d_a.scatter_add_(1, targets[:, None], (-ce * factor)[:, None])
    if options.softcap is not None:
        d_a.addcmul_(d_a, values.div_(options.softcap).square_(), value=-1)
    if bias_sum is not None:
        bias_sum.add_(d_a.sum(0))
    if d_a is not z:
        z.copy_(d_a)


@cache
def _compiled_block() -> Callable[..., None]:
    return torch.compile(_block)


def _likeliest(teacher: Tensor | SparseTargets) -> Tensor:
    """int64 [N, 1], the teacher's likeliest id; anything where it says nothing."""
    if isinstance(teacher, SparseTargets):
        return teacher.ids.clamp_min(0).gather(1, teacher.logprobs.argmax(-1, keepdim=True))
    return teacher.argmax(-1, keepdim=True)


def _dense_rows(
    y: Tensor, a: Tensor, q: Tensor, log_total: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """D, dD/da and bad rows, from the teacher's logits y, which are overwritten."""
    if divergence.temperature != 1:
        y.div_(divergence.temperature)
    highest = y.amax(-1, keepdim=True)  # NaN where the row holds one
    bad = ~highest.isfinite()
    asked = bad.device.type == "cpu" and not torch.compiler.is_compiling()
    if not asked or bool(bad.any()):  # looking at it would hold up a GPU's queue
        y.masked_fill_(bad, 0.0)
        highest = highest.masked_fill(bad, 0.0)
    torch.maximum(y, highest + FLOOR, out=y)
    p, their_total = _probabilities(y)
    u = y.sub_(a).sub_(their_total - log_total)
    value, d_a = divergence_rows(p, q, u, divergence)
    return value, d_a, bad[:, 0]


def _sparse_rows(
    kept: SparseTargets, log_q: Tensor, q: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from kept ids: D over the buckets {each kept id, all others together}."""
    used = kept.ids >= 0
    ids = kept.ids.clamp_min(0)
    bad = ~used.any(-1)
    log_p = kept.logprobs.to(log_q.dtype).masked_fill(~used, float("-inf"))
    tail = kept.tail.to(log_q.dtype)
    log_q_kept = log_q.gather(1, ids)
    if divergence.kind == "forward_kl" and _is_whole(kept):
        # Of a sample the exact -H(p) is better than the sample's own.
        p = log_p.exp()
        value = -(p * log_q_kept.masked_fill(~used, 0.0)).sum(-1) - kept.entropy.to(log_q.dtype)
        return value, (q * p.sum(-1, keepdim=True)).scatter_add_(1, ids, -p), bad
    # Places that are not used stand for the row's first id, which is taken out of the rest anyway.
    rest = log_q.scatter_(1, torch.where(used, ids, ids[:, :1]), float("-inf"))
    log_q_all = torch.cat([log_q_kept, torch.logsumexp(rest, -1, keepdim=True)], 1).clamp_min_(FLOOR)
    log_p_all = torch.cat([log_p, tail[:, None]], 1).clamp_min_(FLOOR)
    empty = torch.cat([~used, torch.zeros_like(used[:, :1])], 1)
    log_q_all.masked_fill_(empty, FLOOR)  # p = q = exp(-100): nothing
    q_all = log_q_all.exp()
    value, d_all = divergence_rows(log_p_all.exp(), q_all, log_p_all - log_q_all, divergence)
    # Every id of the rest moves the rest in proportion to its share of it; a kept id has its own.
    d_a = (q * (d_all[:, -1:] / q_all[:, -1:])).masked_fill_(rest == float("-inf"), 0.0)
    return value, d_a.scatter_add_(1, ids, d_all[:, :-1].masked_fill(~used, 0.0)), bad


def _is_whole(kept: SparseTargets) -> bool:
    """Whether nothing is left out."""
    return bool((kept.tail == float("-inf")).all()) if kept.whole is None else kept.whole


def _check(student: Side, teacher: Side | SparseTargets, targets: Tensor, loss_weights: Tensor, vocab: int) -> None:
    n, sides = len(targets), (("student", student), ("teacher", teacher))
    for name, side in sides:
        if isinstance(side, Side) and side.weight.numel() == 0:
            raise ValueError(f"{name}.weight is empty: a parameter partitioned by ZeRO-3 must be gathered first")
    for name, side in sides:
        if isinstance(side, Side):
            wide = side.weight.shape[-1] if side.weight.ndim == 2 else -1
            if tuple(side.hidden.shape) != (n, wide):
                raise ValueError(f"{name}.hidden has shape {tuple(side.hidden.shape)}; expected {(n, wide)}")
            if not 0 < vocab <= side.weight.shape[0]:
                raise ValueError(f"vocabulary is {vocab}; the {name}'s head has {side.weight.shape[0]} rows")
        elif len(side.ids) != n:
            raise ValueError(f"{name} holds {len(side.ids)} rows; expected {n}")
    if tuple(loss_weights.shape) != (n,):
        raise ValueError(f"loss_weights has shape {tuple(loss_weights.shape)}; expected {(n,)}")
