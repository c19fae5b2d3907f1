"""Log-probabilities of tokens under a language model, without logits for all of them at once."""

from __future__ import annotations

from torch import Tensor, nn

from ptl.functional.fused_divergence import Side
from ptl.functional.logprobs import fused_linear_logprobs
from ptl.models.heads import head_side


class TokenLogprobs(nn.Module):
    """The head and the log-softmax as a module of its own, for the same reason as ``heads.HeadLoss``.

    Args:
        model: the causal language model; it stays the owner of its parameters, this module has none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, or it would be registered as a submodule

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 [N], log-probability of each target int64 [N] by the hidden state [N, H] that predicts it."""
        return side_logprobs(head_side(self._model[0], hidden), targets)


def side_logprobs(side: Side, targets: Tensor) -> Tensor:
    """float32 [N], log-probabilities of targets int64 [N] under a head with its hidden states."""
    return fused_linear_logprobs(
        side.hidden,
        side.weight,
        targets,
        bias=side.bias,
        low_rank=side.low_rank,
        softcap=side.softcap,
        logit_scale=side.logit_scale,
    )
