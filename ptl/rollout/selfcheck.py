"""Whether what was sampled is what is trained, checked before the first update of every run.

Most silent failures of reinforcement learning show here as a number that should be 0 and is not: a setting of the
model's generation configuration that leaked into the sampling, a temperature that one side does not know, a cache of
old weights, dropout, a reference that is another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 1e-3
"""Nats a token by which kernels of 32 bits may differ on average; what goes wrong differs by tenths."""
ROUNDED = 0.05
"""The same where one of the two computes in 16 bits or on codes."""


class SelfCheckError(ValueError):
    """Sampling and training do not agree; the message names the likely cause."""


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """Limits of the check.

    Attributes:
        tolerance: largest mean difference of a token's log-probability between engine and trainer, in nats; None takes
            0.001 in 32 bits, else 0.05.
        min_finished: least share of answers that come to their end, in [0, 1].
    """

    tolerance: float | None = None
    min_finished: float = 0.01

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"model.self_check.tolerance must be above 0, got {self.tolerance}")
        if not 0 <= self.min_finished <= 1:
            raise ValueError(f"model.self_check.min_finished must be in [0, 1], got {self.min_finished}")


class Evidence(NamedTuple):
    """What a rank saw, to be added up (``sums``) and to take the largest of (``most``) over ranks.

    Attributes:
        sums: float64 [6]: trained tokens, sum of their mismatch between engine and trainer, groups, groups whose
            answers are all the same, answers, finished answers.
        most: float64 [3]: largest mismatch of a token, largest difference between a token's log-probability in
            training and in evaluation mode, largest distance from the reference.
    """

    sums: Tensor
    most: Tensor


def token_evidence(
    trainer: Tensor, quiet: Tensor, behaviour: Tensor | None, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens and mismatch [2], and ``most`` [3], of a micro-batch.

    Args:
        trainer: float32 [M], log-probabilities in training mode.
        quiet: in evaluation mode.
        behaviour: by the engine; None where it gives none.
        reference: under the reference where it should be equal; None else.
    """

    def largest(other: Tensor | None) -> Tensor:
        distance = torch.zeros(0) if other is None else (trainer.detach() - other).abs().nan_to_num(torch.inf)
        return distance.max().double() if distance.numel() else torch.zeros((), dtype=torch.float64)

    mismatch = torch.zeros(1) if behaviour is None else (trainer.detach() - behaviour).abs().nan_to_num(torch.inf)
    count = torch.tensor(float(trainer.numel()), dtype=torch.float64)
    sums = torch.stack([count, mismatch.double().sum().cpu()])
    return sums, torch.stack([largest(of).cpu() for of in (behaviour, quiet, reference)])


def judge(evidence: Evidence, limits: SelfCheck, *, exact: bool, engine: str) -> dict[str, float]:
    """The numbers of the check, where all is well.

    Args:
        evidence: of all ranks.
        limits: see ``SelfCheck``.
        exact: whether both sides compute in 32 bits.
        engine: its name, for the message.

    Raises:
        SelfCheckError: with the likely cause and the key to change.
    """
    tokens, mismatch, groups, same, answers, finished = evidence.sums.tolist()
    worst, dropout, distance = evidence.most.tolist()
    tolerance = limits.tolerance or (EXACT if exact else ROUNDED)
    mean = mismatch / tokens if tokens else 0.0
    if groups and same == groups:
        raise SelfCheckError(
            f"self-check: the answers to each of {groups:.0f} prompts are all the same, so nothing can be learned from "
            "comparing them. The likely cause: a temperature near 0 (model.rollout.temperature), or a policy that has "
            "collapsed on one answer"
        )
    if answers and finished < limits.min_finished * answers:
        raise SelfCheckError(
            f"self-check: {finished:.0f} of {answers:.0f} answers came to their end, below the share "
            f"{limits.min_finished:g} of model.self_check.min_finished. The likely cause: model.rollout.max_new_tokens "
            "is too small, or the policy has not learned to end its turn (fine-tune it on chat data first); set "
            "min_finished to 0 where answers are meant to be cut"
        )
    if dropout > 0:
        raise SelfCheckError(
            f"self-check: the same tokens have log-probabilities that differ by {dropout:.2g} between training and "
            "evaluation mode, so the ratio to what was sampled is not 1. The likely cause: dropout; set it to 0 "
            "(model.policy.adapter.dropout, model.policy.config_overrides: {attention_dropout: 0.0})"
        )
    if not mean <= tolerance:
        raise SelfCheckError(
            f"self-check: engine and trainer give the sampled tokens log-probabilities that differ by {mean:.3g} nats "
            f"on average (at most {worst:.3g}), more than {tolerance:g}. The likely cause: {engine} draws with other "
            "weights, another temperature or a truncated distribution, or positions and padding differ; where both "
            "compute in other precisions, raise model.self_check.tolerance and keep model.importance on"
        )
    if distance > (0 if exact else tolerance):
        raise SelfCheckError(
            f"self-check: policy and reference differ by {distance:.3g} nats before the first step, and the reference "
            "is meant to be the policy before training. The likely cause: an adapter that does not start at zero "
            "(model.policy.adapter.init); give model.reference a model of its own"
        )
    return {"mismatch": mean, "mismatch_max": worst, "finished": finished / max(answers, 1.0)}
