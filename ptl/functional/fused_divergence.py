"""Distillation loss fused with both LM heads: neither side's logits ever exist for all tokens at once.

Hidden states and heads of both sides go in. Tokens go through in chunks: the teacher's and the student's logits of a
chunk are made, turned into losses and into the gradient with respect to the student's logits, multiplied into the
gradients of the student's hidden states and head, and overwritten by the next chunk. So the forward pass does all the
work and the backward pass only scales, as in ``cross_entropy``.

A tile is a chunk of tokens times the whole vocabulary. Tiles that also cut the vocabulary would need both sides' logits
twice (once for the log-sum-exp, once for the gradient), 2/5 more matrix products for memory that is already a small,
constant number of bytes.

Cost for N tokens: products of 2 N V (3 Hs + Ht) operations (Hs once less where the student's head is frozen), and about
ten passes over each logit, on blocks of rows that stay in the CPU's caches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptl.functional.divergence import FLOOR, Divergence, divergence_rows
from ptl.functional.head import block_rows, chunk_rows
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


class FusedDivergence(NamedTuple):
    """Weighted sums over tokens and what was seen on the way. Only ``total`` has a graph.

    Attributes:
        total: float32 [], sum of weight * ((1 - ce) * T**2 * D + ce * cross-entropy).
        divergence: float32 [], weighted sum of D, without T squared.
        nll: float32 [], weighted sum of the student's negative log-likelihoods at temperature 1.
        weight: float32 [], sum of the weights of all tokens.
        agreement: float32 [], weighted count of tokens whose likeliest id is the same on both sides.
        bad: float32 [], tokens whose teacher row held a NaN or nothing but -inf; they add nothing to ``total``.
        token_divergence: float32 [N], D of each token.
        token_nll: float32 [N].
    """

    total: Tensor
    divergence: Tensor
    nll: Tensor
    weight: Tensor
    agreement: Tensor
    bad: Tensor
    token_divergence: Tensor
    token_nll: Tensor


class _Options(NamedTuple):
    divergence: Divergence
    ce: float
    vocabulary: int
    chunk_tokens: int | None


class _Rows(NamedTuple):
    """Per-token results [N]."""

    loss: Tensor
    divergence: Tensor
    nll: Tensor
    agreement: Tensor
    bad: Tensor


class _Student(NamedTuple):
    """What a gradient may be asked for, all of one dtype: [N, H], [V', H], [V'], [N, R], [V', R]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    reduced: Tensor | None
    up: Tensor | None


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
    reduced, up = student.low_rank or (None, None)
    optional = [None if t is None else t.to(dtype) for t in (student.bias, reduced, up)]
    learner = _Student(student.hidden.to(dtype), student.weight.to(dtype), *optional)
    master = _cast(teacher, autocast) if isinstance(teacher, Side) else teacher
    weights = loss_weights.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    options = _Options(divergence, ce, shared, chunk_tokens)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learner):
            total, *rest = _Function.apply(*learner, student, master, targets, weights, options)
            rows = _Rows(*rest)
        else:
            rows, _ = _run(learner, student, master, targets, weights, options, (False,) * 5)
            total = (rows.loss * weights).sum()
    return FusedDivergence(
        total=total,
        divergence=(rows.divergence * weights).sum(),
        nll=(rows.nll * weights).sum(),
        weight=weights.sum(),
        agreement=(rows.agreement * weights).sum(),
        bad=rows.bad.sum().to(weights.dtype),
        token_divergence=rows.divergence,
        token_nll=rows.nll,
    )


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, reduced, up, side, teacher, targets, weights, options):
        learner = _Student(hidden, weight, bias, reduced, up)
        rows, gradients = _run(learner, side, teacher, targets, weights, options, ctx.needs_input_grad[:5])
        ctx.gradients = gradients  # not save_for_backward: see cross_entropy
        ctx.mark_non_differentiable(*rows)
        return (rows.loss * weights).sum(), *rows

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "backward ran a second time through fused_divergence: its gradients are scaled in place and handed "
                "over once. Compute the loss again, or add the losses before one backward."
            )
        scale = grad_outputs[0]
        return *(None if g is None else g.mul_(scale) for g in gradients), *(None,) * 5


def _run(
    learner: _Student,
    side: Side,
    teacher: Side | SparseTargets,
    targets: Tensor,
    weights: Tensor,
    options: _Options,
    wanted: tuple[bool, ...],
) -> tuple[_Rows, list[Tensor | None]]:
    """Losses of all tokens and the gradients of their weighted sum, chunk by chunk."""
    n, vocab = len(targets), options.vocabulary
    rows = _Rows(*(weights.new_zeros(n) for _ in range(4)), bad=torch.zeros(n, dtype=torch.bool, device=weights.device))
    gradients = [torch.zeros_like(t) if t is not None and want else None for t, want in zip(learner, wanted)]
    d_hidden, d_weight, d_bias, d_reduced, d_up = (
        None if g is None else (g if i in (0, 3) else g[:vocab]) for i, g in enumerate(gradients)
    )
    bias_sum = None if d_bias is None else weights.new_zeros(vocab)
    weight = learner.weight[:vocab]
    up = None if learner.up is None else learner.up[:vocab]
    chunk = chunk_rows(n, vocab, learner.hidden, options.chunk_tokens)
    block = block_rows(chunk, vocab, weights)
    z_all = learner.hidden.new_empty(chunk, vocab)
    y_all = teacher.hidden.new_empty(chunk, vocab) if isinstance(teacher, Side) else None
    for start in range(0, n, chunk):
        here = slice(start, min(start + chunk, n))
        z = _logits(side._replace(hidden=learner.hidden, weight=weight, bias=learner.bias), learner, here, z_all)
        y = _teacher_logits(teacher, here, vocab, y_all) if isinstance(teacher, Side) else None
        for first in range(start, here.stop, block):
            part = slice(first, min(first + block, here.stop))
            inside = slice(part.start - start, part.stop - start)
            gradient = _block(
                z[inside],
                _of_sparse(teacher, part) if isinstance(teacher, SparseTargets) else y[inside],  # pyright: ignore[reportOptionalSubscript]
                side,
                teacher.softcap if isinstance(teacher, Side) else None,
                targets[part],
                weights[part],
                options,
                _Rows(*(row[part] for row in rows)),
                any(wanted),
            )
            if gradient is not None:
                if bias_sum is not None:
                    bias_sum.add_(gradient.sum(0))
                z[inside].copy_(gradient)
        if d_hidden is not None:
            torch.mm(z, weight, out=d_hidden[here])
        if d_weight is not None:
            d_weight.addmm_(z.t(), learner.hidden[here])
        if d_reduced is not None and up is not None:
            torch.mm(z, up, out=d_reduced[here])
        if d_up is not None and learner.reduced is not None:
            d_up.addmm_(z.t(), learner.reduced[here])
    if d_bias is not None and bias_sum is not None:
        d_bias.copy_(bias_sum)
    return rows, gradients


def _logits(side: Side, learner: _Student, here: slice, out: Tensor) -> Tensor:
    """The student's logits of a chunk before the soft cap."""
    low_rank = None if learner.reduced is None or learner.up is None else (learner.reduced, learner.up)
    return _teacher_logits(side._replace(low_rank=low_rank), here, out.shape[1], out)


def _teacher_logits(side: Side, here: slice, vocab: int, out: Tensor | None) -> Tensor:
    assert out is not None
    z, scale, weight = out[: here.stop - here.start], side.logit_scale, side.weight[:vocab]
    if side.bias is not None:
        torch.addmm(side.bias[:vocab], side.hidden[here], weight.t(), beta=scale, alpha=scale, out=z)
    else:
        z.addmm_(side.hidden[here], weight.t(), beta=0.0, alpha=scale)
    if side.low_rank is not None:
        z.addmm_(side.low_rank[0][here], side.low_rank[1][:vocab].t(), alpha=scale)
    return z


def _block(
    z: Tensor,
    teacher: Tensor | SparseTargets,
    side: Side,
    teacher_cap: float | None,
    targets: Tensor,
    weights: Tensor,
    options: _Options,
    rows: _Rows,
    gradient: bool,
) -> Tensor | None:
    """Losses of a block of rows; the gradient of their weighted sum for the student's unscaled logits, where wanted."""
    t, ce = options.divergence.temperature, options.ce
    values = z.to(weights.dtype, copy=True)
    if side.softcap is not None:
        values.div_(side.softcap).tanh_().mul_(side.softcap)
    log_q = torch.log_softmax(values if t == 1 else values / t, -1)
    best = values.argmax(-1)
    picked = values.gather(1, targets[:, None])[:, 0]
    # At temperature 1 the log-sum-exp is that of log_q: values - log_q is the same number in every column.
    lse = (values[:, 0] - log_q[:, 0]) if t == 1 else torch.logsumexp(values, -1)
    torch.sub(lse, picked, out=rows.nll)
    if isinstance(teacher, SparseTargets):
        value, d_a, bad, their_best = _sparse_rows(teacher, log_q, options.divergence)
    else:
        value, d_a, bad, their_best = _dense_rows(teacher, log_q, teacher_cap, options.divergence)
    rows.divergence.copy_(value)
    rows.bad.copy_(bad)
    rows.agreement.copy_(((best == their_best) & ~bad).to(weights.dtype))
    rows.loss.copy_(((1 - ce) * t * t * value + ce * rows.nll).masked_fill_(bad, 0.0))
    if not gradient:
        return None
    factor = (weights * side.logit_scale).masked_fill(bad, 0.0)
    d_a.masked_fill_(bad[:, None], 0.0)
    # T squared of the loss over the T of a = z / T.
    d_a.mul_(((1 - ce) * t * factor)[:, None])
    if ce:
        d_a.add_(torch.softmax(values, -1).mul_((ce * factor)[:, None]))
        d_a.scatter_add_(1, targets[:, None], (-ce * factor)[:, None])
    if side.softcap is not None:
        d_a.addcmul_(d_a, values.div_(side.softcap).square_(), value=-1)
    return d_a


def _dense_rows(
    y: Tensor, log_q: Tensor, cap: float | None, divergence: Divergence
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D, dD/da, bad rows and the teacher's likeliest ids, from the teacher's logits."""
    values = y.to(log_q.dtype, copy=True)
    if cap is not None:
        values.div_(cap).tanh_().mul_(cap)
    if divergence.temperature != 1:
        values.div_(divergence.temperature)
    highest, best = values.max(-1)  # NaN where the row holds one
    bad = ~highest.isfinite()
    values.masked_fill_(bad[:, None], 0.0)
    log_p = torch.log_softmax(values, -1, out=values).clamp_(min=FLOOR)
    value, s = divergence_rows(log_p, log_q.clone(), divergence)
    value.masked_fill_(bad, 0.0)
    return value, _finish(s, log_q), bad, best


def _finish(s: Tensor, log_q: Tensor) -> Tensor:
    """``s - q * sum(s)``; overwrites both."""
    return s.addcmul_(log_q.exp_(), s.sum(-1, keepdim=True), value=-1)


def _of_sparse(targets: SparseTargets, part: slice) -> SparseTargets:
    return SparseTargets(*(tensor[part] for tensor in targets))


def _sparse_rows(kept: SparseTargets, log_q: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from kept ids: D over the buckets {each kept id, all others together}."""
    used = kept.ids >= 0
    ids = kept.ids.clamp_min(0)
    bad = ~used.any(-1)
    best = ids.gather(1, kept.logprobs.masked_fill(~used, float("-inf")).argmax(-1, keepdim=True))[:, 0]
    log_p = kept.logprobs.to(log_q.dtype).masked_fill(~used, float("-inf"))
    tail = kept.tail.to(log_q.dtype)
    q = log_q.exp()
    log_q_kept = log_q.gather(1, ids)
    if bool((tail == float("-inf")).all()) and divergence.kind == "forward_kl":
        # Shares of a sample: sum of p (log p - log q) with the exact -H(p) in place of the sample's own.
        p = log_p.exp()
        value = -(p * log_q_kept.masked_fill(~used, 0.0)).sum(-1) - kept.entropy.to(log_q.dtype)
        d_a = q.mul_(p.sum(-1, keepdim=True)).scatter_add_(1, ids, -p)
        return value.masked_fill(bad, 0.0), d_a, bad, best
    rest = log_q.clone()
    # Unused places are id 0, which must be neither removed from the rest nor counted twice.
    rest.scatter_(1, torch.where(used, ids, ids[:, :1]), float("-inf"))
    log_rest = torch.logsumexp(rest, -1).clamp_(min=FLOOR)
    log_p_all = torch.cat([log_p, tail[:, None]], 1).clamp_(min=FLOOR)
    log_q_all = torch.cat([log_q_kept, log_rest[:, None]], 1)
    empty = torch.cat([~used, torch.zeros_like(used[:, :1])], 1)
    log_p_all.masked_fill_(empty, FLOOR)
    log_q_all.masked_fill_(empty, FLOOR)  # p = q = exp(-100): nothing
    value, s = divergence_rows(log_p_all, log_q_all.clone(), divergence)
    total = s.sum(-1, keepdim=True)
    # Every id of the rest has the rest's s over q; a kept id has its own.
    d_a = q * (s[:, -1:] / log_q_all[:, -1:].exp())
    own = s[:, :-1].masked_fill(~used, 0.0)
    d_a.masked_fill_(rest == float("-inf"), 0.0).scatter_add_(1, ids, own)
    d_a.addcmul_(q, total, value=-1)
    return value.masked_fill_(bad, 0.0), d_a, bad, best


def _cast(side: Side, autocast: torch.dtype | None) -> Side:
    """The teacher in one dtype, detached."""
    dtype = autocast or torch.promote_types(side.hidden.dtype, side.weight.dtype)

    def to(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype)

    low_rank = None if side.low_rank is None else (to(side.low_rank[0]), to(side.low_rank[1]))
    bias = None if side.bias is None else to(side.bias)
    return side._replace(hidden=to(side.hidden), weight=to(side.weight), bias=bias, low_rank=low_rank)


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
