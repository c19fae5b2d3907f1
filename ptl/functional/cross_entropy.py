"""Cross-entropy fused with the LM head: the logits of all tokens never exist at once.

Tokens go through in chunks. A chunk's logits are made, turned in place into the gradient with respect to themselves,
multiplied into the gradients of hidden states and head, and overwritten by the next chunk. So the forward pass does
all the work, the backward pass only scales, and what is kept is one gradient per input, whatever the vocabulary.

Cost for N tokens, hidden size H, vocabulary V: three matrix products of 2NHV operations (two where the head is frozen,
one without gradients) and, over each logit, a maximum, a softmax, a maximum and a scaling. On the CPU these four run on
blocks of rows that stay in cache, so that the logits cross the memory bus only for the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptl.functional.head import Inputs, Options, handed_over, run


class FusedLoss(NamedTuple):
    """A weighted sum of token losses and what was seen on the way. Only ``total`` has a graph.

    Attributes:
        total: float32 [], sum over tokens of weight * (smoothed cross-entropy + z-loss).
        nll: float32 [], weighted sum of plain negative log-likelihoods in nats, for perplexity.
        weight: float32 [], sum of the weights.
        correct: float32 [], weighted count of targets that no other token's logit exceeds.
        entropy: float32 [], weighted sum of the entropies of the predicted distributions in nats; None unless asked.
        token_nll: float32 [N], unweighted.
        token_correct: bool [N].
        token_entropy: float32 [N] or None.
    """

    total: Tensor
    nll: Tensor
    weight: Tensor
    correct: Tensor
    entropy: Tensor | None
    token_nll: Tensor
    token_correct: Tensor
    token_entropy: Tensor | None


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    metrics: bool = False,
    compiled: bool = False,
) -> FusedLoss:
    """Weighted sum of the cross-entropies of ``softcap(logit_scale * (hidden @ weight.T + bias))``.

    Per token, with logits z, target y and weight w, the loss is
    ``w * [(1 - e) * (lse(z) - z_y) + e * (lse(z) - mean(z)) + z_loss * lse(z)**2]``, e the label smoothing. Log-sum-exp
    and losses are float32 whatever the dtype (float64 for float64 inputs). Gradients are exact for whatever requires
    them and nothing is computed for the rest. Matrix products run in the autocast dtype where autocast is on, else in
    the wider dtype of hidden states and head; the head's gradient is accumulated over chunks in that dtype. In bfloat16
    its relative error is 0.2 % in one chunk, which is the rounding of the result, 0.3 % in 4 and 0.5 % in 16.

    Args:
        hidden: [N, H], the hidden states that predict ``targets``; N may be 0.
        weight: [V, H], the head.
        targets: int64 [N], in [0, V).
        loss_weights: [N], any finite numbers; no gradient flows to them.
        bias: [V].
        low_rank: ``(reduced [N, R], up [V, R])``, adds ``reduced @ up.T`` to the logits before the scale: a LoRA branch
            on the head, at the cost of R and not of H columns.
        softcap: c of ``c * tanh(z / c)``, the final logit soft-capping of Gemma 2 (arXiv:2408.00118); None is none.
        logit_scale: factor on the logits, before the soft cap.
        label_smoothing: e, in [0, 1), as in ``torch.nn.functional.cross_entropy``.
        z_loss: coefficient of the squared log-sum-exp (PaLM, arXiv:2204.02311, section 5), >= 0.
        chunk_tokens: tokens of a chunk; None bounds a chunk of logits by ``CHUNK_BYTES``.
        metrics: also the entropy, which costs one more pass over the logits.
        compiled: where no other option is set, the element-wise work runs in few kernels (``torch.compile``).

    Raises:
        ValueError: shapes do not fit, or an option is out of its range.
        RuntimeError: backward a second time through the same graph. Gradients are scaled in place, to save a copy of
            the head.
    """
    reduced, up = low_rank if low_rank is not None else (None, None)
    check_shapes(Inputs(hidden, weight, bias, reduced, up), targets, loss_weights)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
    if z_loss < 0.0:
        raise ValueError(f"z_loss is {z_loss}; it must not be negative")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None for no soft cap")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1, or None to choose it by size")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    optional = [None if t is None else t.to(dtype) for t in (bias, reduced, up)]
    inputs = Inputs(hidden.to(dtype), weight.to(dtype), *optional)
    options = Options(softcap, logit_scale, label_smoothing, z_loss, chunk_tokens, metrics, compiled)
    weights = loss_weights.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            total, nll, correct, entropy = _FusedLinearCrossEntropy.apply(*inputs, targets, weights, options)
        else:
            (loss, nll, correct, entropy), _ = run(inputs, targets, weights, options, (False,) * 5)
            total = (loss * weights).sum()
    return FusedLoss(
        total=total,
        nll=(nll * weights).sum(),
        weight=weights.sum(),
        correct=(correct * weights).sum(),
        entropy=None if entropy is None else (entropy * weights).sum(),
        token_nll=nll,
        token_correct=correct,
        token_entropy=entropy,
    )


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, reduced, up, targets, weights, options):
        inputs = Inputs(hidden, weight, bias, reduced, up)
        rows, gradients = run(inputs, targets, weights, options, ctx.needs_input_grad[:5])
        ctx.gradients = gradients  # see handed_over
        total = (rows.loss * weights).sum()
        ctx.mark_non_differentiable(*(t for t in rows[1:] if t is not None))
        return total, rows.nll, rows.correct, rows.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        return *handed_over(ctx, grad_outputs[0], "fused_linear_cross_entropy"), None, None, None


def check_shapes(inputs: Inputs, targets: Tensor, loss_weights: Tensor) -> None:
    """Raises ValueError where shapes do not fit, with the one that is expected."""
    n, h = inputs.hidden.shape if inputs.hidden.ndim == 2 else (-1, -1)
    vocab = inputs.weight.shape[0]
    rank = inputs.reduced.shape[-1] if inputs.reduced is not None else 0
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("hidden", inputs.hidden, (n, h)),
        ("weight", inputs.weight, (vocab, h)),
        ("targets", targets, (n,)),
        ("loss_weights", loss_weights, (n,)),
        ("bias", inputs.bias, (vocab,)),
        ("low_rank[0]", inputs.reduced, (n, rank)),
        ("low_rank[1]", inputs.up, (vocab, rank)),
    )
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            hint = " (a parameter partitioned by ZeRO-3 must be gathered first)" if tensor.numel() == 0 and n else ""
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}{hint}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets has dtype {targets.dtype}; expected torch.int64")
