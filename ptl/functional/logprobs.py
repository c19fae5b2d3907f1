"""Log-probabilities of given tokens, fused with the LM head and differentiable one by one.

``cross_entropy`` gives the gradient of one weighted sum and makes it on the way forward. Where the weights depend on
the log-probabilities themselves (preferences, policy gradients), they are not known then. So the backward pass makes
the logits again: two more products than it needs, and still no [N, V] tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptl.functional.cross_entropy import check_shapes
from ptl.functional.head import Inputs, Options, run


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
) -> Tensor:
    """``log softmax(softcap(logit_scale * (hidden @ weight.T + bias)))`` at ``targets``, float32 [N] (or float64).

    Args:
        hidden: [N, H]; N may be 0.
        weight: [V, H].
        targets: int64 [N], in [0, V).
        bias, low_rank, softcap, logit_scale, chunk_tokens: as in ``fused_linear_cross_entropy``.

    Raises:
        ValueError: shapes do not fit.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    reduced, up = low_rank if low_rank is not None else (None, None)
    inputs = Inputs(*(None if t is None else t.to(dtype) for t in (hidden, weight, bias, reduced, up)))  # pyright: ignore[reportArgumentType]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check_shapes(inputs, targets, torch.empty(targets.shape, dtype=wide, device=targets.device))
    options = Options(softcap, logit_scale, 0.0, 0.0, chunk_tokens, False)
    with torch.autocast(device, enabled=False):
        return _FusedLinearLogprobs.apply(*inputs, targets, options, wide)  # pyright: ignore[reportReturnType]


class _FusedLinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, reduced, up, targets, options, wide):
        ctx.save_for_backward(hidden, weight, bias, reduced, up, targets)
        ctx.options = options
        ones = torch.ones(len(targets), dtype=wide, device=hidden.device)
        rows, _ = run(Inputs(hidden, weight, bias, reduced, up), targets, ones, options, (False,) * 5)
        return -rows.nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor):
        *inputs, targets = ctx.saved_tensors
        # The gradient of sum(g * logprob) is that of the cross-entropy with weights -g.
        _, gradients = run(Inputs(*inputs), targets, -grad_outputs[0], ctx.options, ctx.needs_input_grad[:5])
        return *gradients, None, None, None
