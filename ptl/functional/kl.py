"""The divergence from a reference policy, estimated on sampled tokens, with the gradient that belongs to it.

With l, o and r the log-probabilities of a sampled token under the policy, the policy it was drawn from and the
reference, and w = exp(l - o), Schulman's estimators of KL(policy || reference) are

    k1 = l - r        k2 = (l - r)^2 / 2        k3 = exp(r - l) - (r - l) - 1

k1 and k3 have the right mean, k2 has not; k3 varies least and is never negative. Their *gradients* are another matter
(checked by enumeration in the tests):

    in the loss, as it stands    k1: 0         k2: of KL(policy || reference)    k3: of KL(reference || policy)
    in the loss, times w         k1: right     k2: wrong                         k3: right
    in the reward                k1: right     k2: wrong                         k3: wrong

``kl_loss`` therefore weighs k1 and k3 by w and k2 by a constant w; then the gradient is that of KL(policy || reference)
at any w, on-policy or not. At w = 1 the gradients of k2 and k3 are the same number for each token, (l - r) grad l, and
that of k1 has grad l more, which is noise of mean 0.

In the loss, a token's term says nothing of where the token leads: it is the divergence at the contexts that were
visited. In the reward, returns carry it back, and what is lowered is the divergence of whole sequences.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
BOUND = 20.0
"""Largest size of a log-ratio: exp(20) stays finite in any sum, and no clipping range reaches it."""


def kl_loss(logprobs: Tensor, old: Tensor, reference: Tensor, estimator: Estimator = "k3") -> Tensor:
    """A token's part of the loss [N], whose gradient is that of KL(policy || reference) in expectation.

    Args:
        logprobs: l [N], with its graph.
        old: o [N], under the policy that the tokens were drawn from; no gradient flows to it.
        reference: r [N]; no gradient flows to it.
        estimator: ``k3`` has the value to log too.
    """
    old, reference = old.detach(), reference.detach()
    w = (logprobs - old).clamp(-BOUND, BOUND).exp()
    k1 = logprobs - reference
    if estimator == "k1":
        return w * k1
    if estimator == "k2":
        return w.detach() * k1.square() / 2
    # w exp(r - l) is exp(r - o), whatever l is: nothing can overflow where the policy has left a token.
    return (reference - old).clamp(max=BOUND).exp() - w * (1 - k1)


def kl_reward(behaviour: Tensor, reference: Tensor) -> Tensor:
    """What to take from a token's reward, per unit of its coefficient [N]: k1, without a graph.

    Args:
        behaviour: log-probabilities [N] under the policy that drew the tokens.
        reference: [N].
    """
    return (behaviour - reference).detach()


class FixedKL:
    """A coefficient of the divergence that stays.

    Arguments:
        coefficient: 0 or above.
    """

    def __init__(self, coefficient: float = 0.05) -> None:
        if not coefficient >= 0:
            raise ValueError(f"the coefficient of the KL divergence must be 0 or above, got {coefficient}")
        self.value = coefficient

    def update(self, kl: float, sequences: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the configuration has it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Reads nothing."""


class AdaptiveKL:
    """A coefficient that steers the divergence to a target (Ziegler et al., arXiv:1909.08593, section 2.2).

    After each batch it is multiplied by ``1 + e * sequences / horizon``, where e is (KL - target) / target held within
    -0.2 and 0.2.

    Arguments:
        coefficient: to start from, above 0.
        target: nats a sequence, above 0.
        horizon: sequences over which the coefficient may change by a fifth, above 0.

    Attributes:
        value: the coefficient now.
    """

    def __init__(self, coefficient: float = 0.05, *, target: float = 6.0, horizon: int = 10_000) -> None:
        for name, number in (("coefficient", coefficient), ("target", target), ("horizon", horizon)):
            if not number > 0:
                raise ValueError(f"the {name} of the adaptive KL coefficient must be above 0, got {number}")
        self.value, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, sequences: int) -> None:
        """Takes the mean divergence of a batch into account.

        Args:
            kl: nats a sequence, the same number on every rank.
            sequences: of the batch, over all ranks.

        Raises:
            ValueError: the divergence is not a finite number.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL divergence from the reference is {kl}: one of the two models gives no numbers")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A batch of many horizons must not turn the coefficient negative.
        self.value *= 1 + error * min(sequences / self.horizon, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved coefficient."""
        self.value = float(state["value"])
