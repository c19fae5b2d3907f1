"""What GRPO and PPO do alike around their losses: metrics of rollouts, evaluation, and the check before the first step.

Functions and small types, no objective: each objective keeps its own hooks, which call these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptl.data.prompts import PromptView
from ptl.models.heads import causal_lm
from ptl.models.logprobs import answer_logprobs
from ptl.models.modes import evaluating
from ptl.models.spec import ModelSpec
from ptl.objectives.reference import Reference
from ptl.rollout.buffer import Group
from ptl.rollout.engine import Engine
from ptl.rollout.evaluation import Evaluation
from ptl.rollout.rollouts import Rollout, Rollouts, Sums
from ptl.rollout.selfcheck import Evidence, token_evidence
from ptl.types import LossOutput, RolloutBatch

EVALUATED = ("length", "finished", "reward")


class Evaluated(NamedTuple):
    """What an evaluation's batch came to, by name of the data source."""

    by_source: dict[str, Sums]


def check_policy(policy: ModelSpec, engine: Engine) -> None:
    """Refuses a policy that cannot be sampled and trained alike.

    Raises:
        ValueError: with the key to change.
    """
    engine.check(policy)
    if policy.adapter is not None and policy.adapter.dropout:
        raise ValueError(
            f"model.policy.adapter.dropout is {policy.adapter.dropout}: a policy that drops out in training is not the "
            "one that was sampled. Set it to 0"
        )


def prompt_view(arguments: Mapping[str, Any]) -> PromptView:
    """The view of the prompts, out of an objective's arguments as a configuration has them."""
    rollout = arguments.get("rollout") or {}
    return PromptView(room=int(rollout.get("max_new_tokens", Rollout.max_new_tokens)))


def evaluation_names(how: Evaluation, rollouts: Rollouts, sources: tuple[str, ...]) -> tuple[str, ...]:
    """Names of an evaluation's metrics; those by source have it behind an underscore."""
    own = (*how.names, *EVALUATED)
    return (*own, *(f"{name}_{source}" for source in sources for name in own), *rollouts.metric_names)


def evaluation_output(evaluated: Evaluated, rollouts: Rollouts, device: torch.device, sources: tuple[str, ...]):
    """The metrics of an evaluation's batch, as what an objective's loss returns."""
    sums: dict[str, tuple[float, float]] = {}
    for source, found in evaluated.by_source.items():
        for name, (total, weight) in found.items():
            for key in (name, f"{name}_{source}") if source in sources else (name,):
                had = sums.get(key, (0.0, 0.0))
                sums[key] = (had[0] + total, had[1] + weight)
    sums = {**rollouts.take_sums(), **sums}
    zero = torch.zeros((), device=device)
    return LossOutput(zero, zero, {"loss": (zero, zero), **tensors(sums, device)})


def tensors(sums: Sums, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and weights as float64 tensors."""
    return {
        name: tuple(torch.tensor(float(x), dtype=torch.float64, device=device) for x in pair)  # pyright: ignore
        for name, pair in sums.items()
    }


@torch.no_grad()
def evidence_of(
    policy: nn.Module,
    batch: RolloutBatch,
    groups: list[Group],
    *,
    temperature: float,
    reference: Reference | None,
) -> tuple[Evidence, bool]:
    """What a rank's first micro-batch and its answers say of the sampling, and whether all is in 32 bits.

    Args:
        policy: in training mode, before its first update since the sampling.
        batch: on the policy's device.
        groups: all that the rank has sampled.
        temperature: of the sampling.
        reference: where it should be equal to the policy; None else.
    """
    trainer = answer_logprobs(policy, batch.answers, temperature)
    with evaluating(policy):
        quiet = answer_logprobs(policy, batch.answers, temperature)
    held = None if reference is None else reference.logprobs(policy, batch.answers, temperature)
    sums, most = token_evidence(trainer, quiet, batch.tokens.get("behaviour"), held)
    compared = [group for group in groups if len(group.answers) > 1]
    same = sum(len({answer.ids.tobytes() for answer in group.answers}) == 1 for group in compared)
    answers = [answer for group in groups for answer in group.answers]
    counts = [len(compared), same, len(answers), sum(answer.finished for answer in answers)]
    device = trainer.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.float32
    exact = not autocast and causal_lm(policy).get_input_embeddings().weight.dtype == torch.float32
    return Evidence(torch.cat([sums, torch.tensor(counts, dtype=torch.float64)]), most), exact
