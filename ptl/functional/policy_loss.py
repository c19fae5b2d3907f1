"""Policy-gradient losses on sampled tokens: GRPO and its kin, PPO's clipped surrogate, as sums with their weights.

With l and o the log-probabilities of a token under the policy and under the policy it was drawn from (both by the
trainer), A its advantage, and w a ratio of probabilities, a token's loss is

    clipped    -min(w A, clip(w, 1 - e_low, 1 + e_high) A)          (PPO, arXiv:1707.06347, equation 7)
    cispo      -constant[clip(w, 1 - e_low, 1 + e_high)] A l        (MiniMax-M1, arXiv:2506.13585, equations 4 and 5)

and the kinds differ in what w is, and in how tokens are weighed:

    kind     w                          a token's weight              counted in    source
    grpo     exp(l - o)                 1 / length                    sequences     arXiv:2402.03300
    dr_grpo  exp(l - o)                 1 / a constant length         sequences     arXiv:2503.20783
    dapo     exp(l - o)                 1                             tokens        arXiv:2503.14476
    bnpo     exp(l - o)                 1 / tokens of its group       groups        TRL's name; see below
    gspo     exp(mean of l - o)         1 / length                    sequences     arXiv:2507.18071
    cispo    exp(l - o)                 1                             tokens        arXiv:2506.13585
    rloo     exp(sum of l - o)          1 / length                    sequences     arXiv:2402.14740

Length is the number of trained tokens. A mean or sum is over a sequence's trained tokens and holds for each of them, so
that a sequence's loss enters whole: on-policy, RLOO's gradient is A times that of the sequence's log-probability.
TRL's "bnpo" is a mean over the tokens of whatever share a micro-batch, and so changes with the split; here the batch
whose tokens are averaged is the group of answers to one prompt.

Advantages choose the rest: RLOO takes ``leave_one_out``, GRPO the deviation of the group, Dr. GRPO none
(``ptl.functional.advantages``). What is divided by: ``ptl.functional.policy_weights``.

Shape letters: N sampled tokens, S sequences. See ``ptl.functional.sequences`` for ``owners`` and ``mask``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ptl.functional.kl import BOUND, Estimator, kl_loss
from ptl.functional.policy_weights import FORMS, Form, Kind, Weights, weights_of
from ptl.functional.sequences import per_sequence, trained_lengths
from ptl.types import LossOutput


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A loss with its numbers.

    Attributes:
        kind: which one.
        clip_low: e_low in [0, 1]; None is the kind's own.
        clip_high: e_high, 0 or above; None is the kind's own. Above e_low it is DAPO's clip-higher, which lets rare
            tokens grow.
        dual_clip: c above 1: where A < 0 the loss is at most -c A (arXiv:1912.09729, equation 5); None does without.
        constant: the constant length of ``dr_grpo``.
        kl: factor of the divergence from the reference, 0 or above; its tokens are weighed as the policy's are.
        kl_estimator: as in ``ptl.functional.kl``.
        entropy: factor of the entropy, which is taken from the loss; below 0 lowers the entropy.

    Raises:
        ValueError: a number out of its range.
    """

    kind: Kind = "dapo"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    constant: int | None = None
    kl: float = 0.0
    kl_estimator: Estimator = "k3"
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in FORMS:
            raise ValueError(f"the loss is {self.kind!r}; expected one of {list(FORMS)}")
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low must be in [0, 1], got {self.clip_low}")
        if self.clip_high is not None and not self.clip_high >= 0:
            raise ValueError(f"clip_high must be 0 or above, got {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")
        if self.dual_clip is not None and FORMS[self.kind].surrogate == "cispo":
            raise ValueError("cispo clips the weight of every token, so dual_clip has nothing to clip: leave it out")
        if not self.kl >= 0:
            raise ValueError(f"kl must be 0 or above, got {self.kl}")

    @property
    def form(self) -> Form:
        """What makes the kind, with the clip of this loss."""
        form = FORMS[self.kind]
        low = form.clip_low if self.clip_low is None else self.clip_low
        return form._replace(clip_low=low, clip_high=form.clip_high if self.clip_high is None else self.clip_high)

    def weights(self, mask: Tensor, owners: Tensor, sequences: int, *, group_tokens: Tensor | None = None) -> Weights:
        """``weights_of`` this loss."""
        return weights_of(self.kind, mask, owners, sequences, constant=self.constant, group_tokens=group_tokens)


class PolicyTokens(NamedTuple):
    """What a loss reads of N sampled tokens.

    Attributes:
        logprobs: [N], under the policy, with their graph, at the temperature of the sampling.
        old: [N], under the policy before the first update on these tokens, by the trainer. On the first update that is
            ``logprobs.detach()``, so that the ratio is 1 and not nearly 1.
        advantages: [N].
        mask: bool [N].
        owners: int64 [N].
        sequences: S.
        reference: [N], under the reference; needed where its divergence has a factor.
        correction: [N], factor of the policy's part of a token's loss (``ptl.functional.importance``).
        entropy: [N], of the policy at the token's place, with its graph where its factor is not 0.
        group_tokens: as in ``weights_of``.
    """

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    owners: Tensor
    sequences: int
    reference: Tensor | None = None
    correction: Tensor | None = None
    entropy: Tensor | None = None
    group_tokens: Tensor | None = None


def policy_loss(tokens: PolicyTokens, loss: PolicyLoss) -> LossOutput:
    """The weighted sum over the tokens, its weight, and sums over the trained tokens.

    In float32, or float64 where the log-probabilities are.

    Returns:
        Metrics, each over the number of trained tokens: ``ratio`` (mean of w), ``clip_low`` and ``clip_high`` (share
        of tokens that a bound keeps from moving further, or whose weight it changes in ``cispo``), ``dual_clip``
        where it is on, ``policy_kl`` (estimate of KL(old || policy)), ``reference_kl`` (of KL(policy || reference)),
        ``entropy``.

    Raises:
        ValueError: the reference or the entropy is missing though it has a factor.
    """
    if loss.kl and tokens.reference is None:
        raise ValueError(f"kl is {loss.kl}, and there are no log-probabilities of a reference")
    if loss.entropy and tokens.entropy is None:
        raise ValueError(f"entropy is {loss.entropy}, and there is no entropy of the policy")
    mask = tokens.mask
    wide = torch.promote_types(tokens.logprobs.dtype, torch.float32)

    def kept(values: Tensor) -> Tensor:
        return torch.where(mask, values.to(wide), 0.0)

    logprobs, old, advantages = kept(tokens.logprobs), kept(tokens.old.detach()), kept(tokens.advantages.detach())
    log_ratio = (logprobs - old).clamp(-BOUND, BOUND)
    losses, ratio, clipped = _surrogate(logprobs, log_ratio, advantages, tokens, loss)
    if tokens.correction is not None:
        losses = losses * kept(tokens.correction.detach())
    count = mask.sum().to(wide)
    metrics = {"ratio": kept(ratio.detach()), **{name: kept(hit) for name, hit in clipped.items()}}
    metrics["policy_kl"] = kept((log_ratio.exp() - 1 - log_ratio).detach())
    if tokens.reference is not None:
        reference = kept(tokens.reference)
        losses = losses + loss.kl * kl_loss(logprobs, old, reference, loss.kl_estimator)
        metrics["reference_kl"] = kl_loss(logprobs.detach(), old, reference, "k3")
    if tokens.entropy is not None:
        losses = losses - loss.entropy * kept(tokens.entropy)
        metrics["entropy"] = kept(tokens.entropy.detach())
    weights = loss.weights(mask, tokens.owners, tokens.sequences, group_tokens=tokens.group_tokens)
    total = (losses * weights.tokens.to(wide)).sum()
    return LossOutput(total, weights.total.to(wide), {name: (kept(m).sum(), count) for name, m in metrics.items()})


def _surrogate(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, tokens: PolicyTokens, loss: PolicyLoss
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses [N], ratios [N], and which tokens were clipped, by name of the bound."""
    form = loss.form
    ratio = _ratio(log_ratio, tokens, form)
    inside = ratio.clamp(1 - form.clip_low, 1 + form.clip_high)
    if form.surrogate == "cispo":
        low, high = ratio < 1 - form.clip_low, ratio > 1 + form.clip_high
        return -inside.detach() * advantages * logprobs, ratio, {"clip_low": low, "clip_high": high}
    losses = torch.maximum(-ratio * advantages, -inside * advantages)
    clipped = {
        "clip_low": (ratio < 1 - form.clip_low) & (advantages < 0),
        "clip_high": (ratio > 1 + form.clip_high) & (advantages > 0),
    }
    if loss.dual_clip is not None:
        clipped["dual_clip"] = (ratio > loss.dual_clip) & (advantages < 0)
        losses = torch.where(advantages < 0, torch.minimum(losses, -loss.dual_clip * advantages), losses)
    return losses, ratio, clipped


def _ratio(log_ratio: Tensor, tokens: PolicyTokens, form: Form) -> Tensor:
    if form.ratio == "token":
        return log_ratio.exp()
    logs = per_sequence(log_ratio, tokens.owners, tokens.sequences)
    if form.ratio == "mean":
        logs = logs / trained_lengths(tokens.mask, tokens.owners, tokens.sequences).clamp_min(1)
    return logs.clamp(-BOUND, BOUND).exp()[tokens.owners]


def largest_ratio(logprobs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """The largest ratio of the trained tokens' probabilities, float32 []; 0 without any. Ranks take the maximum."""
    ratios = torch.where(mask, (logprobs.detach().float() - old.float()).clamp(-BOUND, BOUND).exp(), 0.0)
    return ratios.max() if ratios.numel() else ratios.new_zeros(())
