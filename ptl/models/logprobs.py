"""Log-probabilities of tokens under a language model, without logits for all of them at once."""

from __future__ import annotations

from torch import Tensor, nn

from ptl.functional.fused_divergence import Side
from ptl.functional.logprobs import fused_linear_logprobs, fused_linear_logprobs_and_entropy
from ptl.models.heads import chosen, head_side, hidden_states
from ptl.types import GroupBatch


class TokenLogprobs(nn.Module):
    """The head and the log-softmax as a module of its own, for the same reason as ``heads.HeadLoss``.

    Args:
        model: the causal language model; it stays the owner of its parameters, this module has none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, or it would be registered as a submodule

    def forward(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0, foreseen: Tensor | None = None
    ) -> Tensor:
        """float32 [N], log-probability of each target int64 [N] by the hidden state [N, H] that predicts it.

        ``foreseen`` as in ``fused_linear_logprobs``.
        """
        return side_logprobs(head_side(self._model[0], hidden), targets, temperature, foreseen)

    def with_entropy(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """The same, and the entropy in nats of each distribution, float32 [N]."""
        side = at_temperature(head_side(self._model[0], hidden), temperature)
        return fused_linear_logprobs_and_entropy(side.hidden, side.weight, targets, **_options(side))


def answer_logprobs(
    model: nn.Module, batch: GroupBatch, temperature: float = 1.0, foreseen: Tensor | None = None
) -> Tensor:
    """Log-probability of each trained token of the answers, float32 [M], at a temperature.

    ``foreseen`` as in ``fused_linear_logprobs``.
    """
    hidden = hidden_states(model, batch.tokens, parents=batch.parents)
    return TokenLogprobs(model)(chosen(hidden, batch.predicted_from), batch.targets, temperature, foreseen)


def answer_logprobs_and_entropy(model: nn.Module, batch: GroupBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """``answer_logprobs``, and the entropy of the distribution that each token was drawn from, float32 [M]."""
    hidden = hidden_states(model, batch.tokens, parents=batch.parents)
    return TokenLogprobs(model).with_entropy(chosen(hidden, batch.predicted_from), batch.targets, temperature)


def side_logprobs(side: Side, targets: Tensor, temperature: float = 1.0, foreseen: Tensor | None = None) -> Tensor:
    """float32 [N], log-probabilities of targets int64 [N] under a head with its hidden states."""
    side = at_temperature(side, temperature)
    return fused_linear_logprobs(side.hidden, side.weight, targets, foreseen=foreseen, **_options(side))


def at_temperature(side: Side, temperature: float) -> Side:
    """The head whose logits are those of ``side`` over the temperature: c tanh(s z / c) / T has the cap c / T."""
    if temperature == 1.0:
        return side
    softcap = None if side.softcap is None else side.softcap / temperature
    return side._replace(softcap=softcap, logit_scale=side.logit_scale / temperature)


def _options(side: Side) -> dict:
    return {
        "bias": side.bias,
        "low_rank": side.low_rank,
        "softcap": side.softcap,
        "logit_scale": side.logit_scale,
    }
