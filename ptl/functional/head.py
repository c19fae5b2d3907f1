"""The pass over chunks of tokens that makes losses and gradients of a fused LM head; see ``cross_entropy``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Bytes of one chunk of logits. Each chunk also reads and writes the whole head gradient once, which on a GPU costs as
much as the product itself below about 500 tokens; hence the larger chunk there."""
BLOCK_BYTES_PER_THREAD = 2 << 20
"""Bytes of float32 logits that one CPU thread works on at a time: what fits in its cache."""


class Options(NamedTuple):
    """Numbers of ``fused_linear_cross_entropy``, by the same names."""

    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    chunk_tokens: int | None
    metrics: bool
    compiled: bool = False

    @property
    def plain(self) -> bool:
        """Whether nothing is asked for but the loss of the logits as they are."""
        return self._replace(chunk_tokens=None, compiled=False) == Options(None, 1.0, 0.0, 0.0, None, False)


class Inputs(NamedTuple):
    """Everything a gradient may be asked for, all of one dtype: [N, H], [V, H], [V], [N, R], [V, R]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    reduced: Tensor | None
    up: Tensor | None


def cut(inputs: Inputs, vocabulary: int) -> Inputs:
    """The same with the first ``vocabulary`` rows of weight, bias and up: a table's padding is left out."""
    bias, up = (None if t is None else t[:vocabulary] for t in (inputs.bias, inputs.up))
    return inputs._replace(weight=inputs.weight[:vocabulary], bias=bias, up=up)


class Rows(NamedTuple):
    """Per-token results [N]."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
    entropy: Tensor | None


def run(
    inputs: Inputs, targets: Tensor, weights: Tensor, options: Options, wanted: tuple[bool, ...]
) -> tuple[Rows, list[Tensor | None]]:
    """Losses of all tokens, and the gradients of their weighted sum for those inputs that are ``wanted``.

    Args:
        inputs: what makes the logits.
        targets: int64 [N].
        weights: [N], of the dtype in which losses are computed.
        options: of the loss.
        wanted: for each input, whether its gradient is.

    Returns:
        Per-token results, and a gradient or None for each input.
    """
    n, vocab = inputs.hidden.shape[0], inputs.weight.shape[0]
    rows = Rows(
        loss=weights.new_empty(n),
        nll=weights.new_empty(n),
        correct=torch.empty(n, dtype=torch.bool, device=weights.device),
        entropy=weights.new_empty(n) if options.metrics else None,
    )
    # The first chunk overwrites weight and up (beta = 0), so their memory is only cleared where there is no chunk.
    make = torch.zeros_like if n == 0 else torch.empty_like
    gradients = [make(t) if t is not None and want else None for t, want in zip(inputs, wanted)]
    bias_sum = None if gradients[2] is None else weights.new_zeros(vocab)
    chunk = chunk_rows(n, vocab, inputs.hidden, options.chunk_tokens)
    block = block_rows(chunk, vocab, weights)
    logits = inputs.hidden.new_empty(chunk, vocab)
    count = 0 if options.compiled and options.plain else _scratch_count(logits.dtype != weights.dtype, options)
    scratch = [weights.new_empty(block, vocab) for _ in range(count)]
    for start in range(0, n, chunk):
        here = slice(start, min(start + chunk, n))
        z = logits[: here.stop - start]
        project(inputs, here, options.logit_scale, z)
        for first in range(start, here.stop, block):
            part = slice(first, min(first + block, here.stop))
            part_z = z[first - start : part.stop - start]
            entropy = None if rows.entropy is None else rows.entropy[part]
            part_rows = Rows(rows.loss[part], rows.nll[part], rows.correct[part], entropy)
            _loss_rows(part_z, targets[part], weights[part], options, scratch, part_rows, any(wanted), bias_sum)
        accumulate(gradients, inputs, here, z)
    d_bias = gradients[2]
    if d_bias is not None and bias_sum is not None:
        d_bias.copy_(bias_sum)
    return rows, gradients


def accumulate(gradients: Sequence[Tensor | None], inputs: Inputs, here: slice, dz: Tensor) -> None:
    """Adds what the gradient ``dz`` [C, V] of a chunk's unscaled logits is for each input whose gradient is wanted.

    The chunk that starts at 0 overwrites what the gradients of weight and up hold. That of the bias is its caller's.
    """
    d_hidden, d_weight, _, d_reduced, d_up = gradients
    beta = float(here.start > 0)
    if d_hidden is not None:
        torch.mm(dz, inputs.weight, out=d_hidden[here])
    if d_weight is not None:
        d_weight.addmm_(dz.t(), inputs.hidden[here], beta=beta)
    if d_reduced is not None and inputs.up is not None:
        torch.mm(dz, inputs.up, out=d_reduced[here])
    if d_up is not None and inputs.reduced is not None:
        d_up.addmm_(dz.t(), inputs.reduced[here], beta=beta)


def handed_over(ctx: Any, scale: Tensor, name: str) -> list[Tensor | None]:
    """The gradients that a forward pass left in ``ctx.gradients``, times ``scale``; once.

    They are kept there and not by ``save_for_backward``: autograd keeps saved tensors until backward has returned, and
    an accumulator that sees a second reference to the head's gradient copies it instead of keeping it.

    Raises:
        RuntimeError: they were handed over before.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError(
            f"backward ran a second time through {name}: its gradients are scaled in place and handed over once. "
            "Compute the loss again, or add the losses before one backward."
        )
    return [None if g is None else g.mul_(scale) for g in gradients]


def project(inputs: Inputs, here: slice, scale: float, out: Tensor) -> None:
    """``scale * (hidden @ weight.T + bias + reduced @ up.T)`` of the rows ``here``, scaled inside the product."""
    if inputs.bias is not None:
        torch.addmm(inputs.bias, inputs.hidden[here], inputs.weight.t(), beta=scale, alpha=scale, out=out)
    else:
        out.addmm_(inputs.hidden[here], inputs.weight.t(), beta=0.0, alpha=scale)
    if inputs.reduced is not None and inputs.up is not None:
        out.addmm_(inputs.reduced[here], inputs.up.t(), alpha=scale)


def _loss_rows(
    z: Tensor,
    targets: Tensor,
    weights: Tensor,
    options: Options,
    scratch: list[Tensor],
    rows: Rows,
    gradient: bool,
    bias_sum: Tensor | None,
) -> None:
    """Losses of a block of rows; leaves in ``z`` the gradient of their weighted sum for the unscaled logits.

    The log-sum-exp comes out of the softmax: its largest probability is exp(0) / sum(exp(z - max)), a number in
    [1 / V, 1] that no rounding can lose.
    """
    if options.compiled and options.plain:
        nll, correct = _compiled_rows()(z, targets, weights, gradient, bias_sum)
        rows.loss.copy_(nll)
        rows.nll.copy_(nll)
        rows.correct.copy_(correct)
        return
    free = iter(scratch)
    values = z if z.dtype == weights.dtype else next(free)[: len(z)].copy_(z)
    if options.softcap is not None:
        values.div_(options.softcap).tanh_().mul_(options.softcap)
    index = targets[:, None]
    highest, picked = values.amax(-1), values.gather(1, index)[:, 0]
    mean = values.mean(-1) if options.label_smoothing else None
    keep = options.metrics or options.softcap is not None
    p = torch.softmax(values, -1, out=next(free)[: len(z)] if keep else values)
    lse = highest - p.amax(-1).log_()
    torch.sub(lse, picked, out=rows.nll)
    torch.ge(picked, highest, out=rows.correct)
    smoothing, z_loss = options.label_smoothing, options.z_loss
    rows.loss.copy_(rows.nll if mean is None else (1 - smoothing) * rows.nll + smoothing * (lse - mean))
    if z_loss:
        rows.loss.add_(lse.square(), alpha=z_loss)
    if rows.entropy is not None:
        torch.sub(lse, torch.einsum("rv,rv->r", p, values), out=rows.entropy)
    if not gradient:
        return
    factor = weights * options.logit_scale
    p.mul_((factor * (1 + 2 * z_loss * lse) if z_loss else factor)[:, None])
    if smoothing:
        p.sub_((factor * (smoothing / z.shape[1]))[:, None])
    p.scatter_add_(1, index, (factor * (smoothing - 1))[:, None])
    if options.softcap is not None:
        p.addcmul_(p, values.div_(options.softcap).square_(), value=-1)
    if bias_sum is not None:
        bias_sum.add_(p.sum(0))
    if p is not z:
        z.copy_(p)


@cache
def _compiled_rows() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(fusible_rows)


def fusible_rows(
    z: Tensor, targets: Tensor, weights: Tensor, gradient: bool, bias_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [C] and whether each target is the likeliest, as ``_loss_rows`` without options; ``z`` as it leaves it.

    Written so that a compiler needs three readings of the logits and one writing.
    """
    values = z.to(weights.dtype)
    highest = values.amax(-1, keepdim=True)
    p = (values - highest).exp()
    total = p.sum(-1, keepdim=True)
    picked = values.gather(1, targets[:, None])
    nll, correct = (highest + total.log() - picked)[:, 0], (picked >= highest)[:, 0]
    if gradient:
        own = torch.arange(z.shape[1], device=z.device)[None, :] == targets[:, None]
        d = (p / total - own.to(p.dtype)) * weights[:, None]
        z.copy_(d)
        if bias_sum is not None:
            bias_sum.add_(d.sum(0))
    return nll, correct


def _scratch_count(convert: bool, options: Options) -> int:
    """Blocks of float32 that a block of rows needs besides its logits."""
    return int(convert) + int(options.metrics or options.softcap is not None)


def chunk_rows(n: int, vocab: int, hidden: Tensor, requested: int | None) -> int:
    """Tokens of a chunk: within the byte limit, not below 64, and such that no chunk is a small remainder."""
    if requested is not None:
        return max(1, min(requested, n))
    most = max(64, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // (vocab * hidden.element_size()))
    pieces = max(1, -(-n // most))
    return max(1, min(n, -(-n // pieces // 16) * 16))


def block_rows(chunk: int, vocab: int, weights: Tensor) -> int:
    """Rows that the element-wise work takes at a time: what the CPU's caches hold; a GPU takes the chunk whole."""
    if weights.device.type != "cpu":
        return chunk
    threads = torch.get_num_threads()
    fit = BLOCK_BYTES_PER_THREAD * threads // (vocab * weights.element_size())
    return min(chunk, max(threads, fit))
