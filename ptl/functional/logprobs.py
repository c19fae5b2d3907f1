"""Log-probabilities of given tokens, fused with the LM head and differentiable one by one.

``cross_entropy`` gives the gradient of one weighted sum and makes it on the way forward. Where the weights depend on
the log-probabilities themselves (preferences, policy gradients), they are not known then. So the backward pass makes
the logits again: one product and one softmax more than it needs, and still no [N, V] tensor. Where the weights can be
foreseen, as in the first step on answers of the policy itself, ``foreseen`` saves them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptl.functional.cross_entropy import check_shapes
from ptl.functional.head import Inputs, Options, accumulate, chunk_rows, project, run


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    foreseen: Tensor | None = None,
) -> Tensor:
    """``log softmax(softcap(logit_scale * (hidden @ weight.T + bias)))`` at ``targets``, float32 [N] (or float64).

    Args:
        hidden: [N, H]; N may be 0.
        weight: [V, H].
        targets: int64 [N], in [0, V).
        bias, low_rank, softcap, logit_scale, chunk_tokens: as in ``fused_linear_cross_entropy``.
        foreseen: [N], what the gradient of the log-probabilities will be, up to a factor. The gradients are then made
            on the way forward, and kept till the first backward pass. Where it turns out otherwise they are made again:
            a wrong guess costs time and changes nothing.

    Raises:
        ValueError: shapes do not fit.
    """
    options = Options(softcap, logit_scale, 0.0, 0.0, chunk_tokens, False)
    return _apply(hidden, weight, targets, bias, low_rank, options, foreseen)[0]


def fused_linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``fused_linear_logprobs``, and the entropy in nats of each of the N distributions, differentiable too."""
    options = Options(softcap, logit_scale, 0.0, 0.0, chunk_tokens, True)
    return _apply(hidden, weight, targets, bias, low_rank, options)


def _apply(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    options: Options,
    foreseen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    reduced, up = low_rank if low_rank is not None else (None, None)
    inputs = Inputs(*(None if t is None else t.to(dtype) for t in (hidden, weight, bias, reduced, up)))  # pyright: ignore[reportArgumentType]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    guess = targets.new_zeros(targets.shape, dtype=wide) if foreseen is None else foreseen.detach().to(wide)
    check_shapes(inputs, targets, guess)
    with torch.autocast(device, enabled=False):
        return _FusedLinearLogprobs.apply(*inputs, targets, options, guess, foreseen is not None)  # pyright: ignore[reportReturnType]


class _FusedLinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, reduced, up, targets, options, guess, foreseen):
        # The gradient of sum(g * logprob) is that of the cross-entropy with weights -g.
        wanted = ctx.needs_input_grad[:5] if foreseen else (False,) * 5
        rows, gradients = run(Inputs(hidden, weight, bias, reduced, up), targets, -guess, options, wanted)
        entropy = guess.new_empty(0) if rows.entropy is None else rows.entropy
        ctx.save_for_backward(hidden, weight, bias, reduced, up, targets, entropy, guess)
        ctx.gradients = gradients if foreseen else None  # not saved tensors: see head.handed_over
        ctx.options = options
        ctx.set_materialize_grads(False)
        return -rows.nll, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None):
        *tensors, targets, entropy, guess = ctx.saved_tensors
        inputs, options, wanted = Inputs(*tensors), ctx.options, ctx.needs_input_grad[:5]
        of_logprobs, of_entropy = grad_outputs
        if of_logprobs is None:
            of_logprobs = torch.zeros(len(targets), dtype=entropy.dtype, device=entropy.device)
        if of_entropy is None or not options.metrics:
            made, ctx.gradients = ctx.gradients, None
            factor = None if made is None else _factor(of_logprobs, guess)
            if made is not None and factor is not None:
                gradients = [None if g is None else g.mul_(factor) for g in made]
            else:
                del made
                plain = options._replace(metrics=False)
                _, gradients = run(inputs, targets, -of_logprobs, plain, wanted)
        else:
            gradients = _with_entropy(inputs, targets, of_logprobs, entropy, of_entropy, options, wanted)
        return *gradients, None, None, None, None


def _factor(found: Tensor, guess: Tensor) -> float | None:
    """f where ``found`` is ``f * guess`` [N] but for the rounding of a product or two; None where there is none."""
    if not guess.numel():
        return 1.0
    at = guess.abs().argmax()
    top, own = float(guess[at]), float(found[at])
    if not top or not torch.isfinite(found).all():
        return None
    factor = own / top
    close = (found - factor * guess).abs() <= 4 * torch.finfo(found.dtype).eps * (factor * guess).abs()
    return factor if bool(close.all()) else None


def _with_entropy(
    inputs: Inputs,
    targets: Tensor,
    of_logprobs: Tensor,
    entropy: Tensor,
    of_entropy: Tensor,
    options: Options,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of ``sum(g * logprob + h * entropy)``: by a logit, ``g (1[target] - p) - h p (log p + entropy)``."""
    n, vocab = len(targets), inputs.weight.shape[0]
    gradients = [torch.zeros_like(t) if t is not None and want else None for t, want in zip(inputs, wanted)]
    chunk = chunk_rows(n, vocab, inputs.hidden, options.chunk_tokens)
    for start in range(0, n, chunk):
        here = slice(start, min(start + chunk, n))
        z = inputs.hidden.new_empty(here.stop - start, vocab)
        project(inputs, here, options.logit_scale, z)
        capped = z.to(of_logprobs.dtype)
        if options.softcap is not None:
            capped = options.softcap * torch.tanh(capped / options.softcap)
        logp = torch.log_softmax(capped, -1)
        p = logp.exp()
        g, h = of_logprobs[here, None], of_entropy[here, None]
        dz = -p * (g + h * (logp + entropy[here, None]))
        dz.scatter_add_(1, targets[here, None], g)
        if options.softcap is not None:
            dz = dz * (1 - (capped / options.softcap).square())
        dz = dz * options.logit_scale
        if gradients[2] is not None:
            gradients[2].add_(dz.sum(0).to(gradients[2].dtype))
        accumulate(gradients, inputs, here, dz.to(inputs.hidden.dtype))
    return gradients
