"""What GRPO and PPO do alike around their losses: metrics of rollouts, evaluation, and the check before the first step.

Functions and small types, no objective: each objective keeps its own hooks, which call these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ptl.data.prompts import PromptView
from ptl.functional.importance import Importance
from ptl.models.heads import causal_lm
from ptl.models.logprobs import answer_logprobs
from ptl.models.modes import evaluating
from ptl.models.spec import ModelSpec
from ptl.objectives.reference import Reference
from ptl.rollout.buffer import Group
from ptl.rollout.engine import Engine
from ptl.rollout.evaluation import Evaluation
from ptl.rollout.hf import HF
from ptl.rollout.ranks import added
from ptl.rollout.rollouts import Rollouts, Sums, merge
from ptl.rollout.selfcheck import Evidence, SelfCheck, judge, token_evidence
from ptl.rollout.settings import Rollout
from ptl.types import LossOutput, RolloutBatch

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

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


def importance_for(engine: Engine, importance: Importance | Literal["auto"] | None) -> Importance | None:
    """The weights between engine and trainer; ``auto`` is none for the engine that draws from the policy itself.

    Raises:
        ValueError: weights for an engine that gives no log-probabilities.
    """
    if importance == "auto":
        return None if isinstance(engine, HF) or not engine.abilities.logprobs else Importance()
    if importance is not None and not engine.abilities.logprobs:
        raise ValueError(
            "model.importance needs the log-probabilities that answers were drawn with, and "
            f"{type(engine).__name__} gives none: set model.importance to null"
        )
    return importance


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
    sums: Sums = {}
    for source, found in evaluated.by_source.items():
        merge(sums, found)
        if source in sources:
            merge(sums, {f"{name}_{source}": pair for name, pair in found.items()})
    sums = {**rollouts.take_sums(), **sums}
    zero = torch.zeros((), device=device)
    return LossOutput(zero, zero, {"loss": (zero, zero), **tensors(sums, device)})


def tensors(sums: Sums, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums and weights as float64 tensors."""
    return {
        name: tuple(torch.tensor(float(x), dtype=torch.float64, device=device) for x in pair)  # pyright: ignore
        for name, pair in sums.items()
    }


def self_check(
    policy: nn.Module,
    batch: RolloutBatch,
    rollouts: Rollouts,
    limits: SelfCheck,
    *,
    strategy: Strategy,
    reference: Reference | None,
) -> None:
    """Whether engine and trainer agree about a rollout, over all ranks, before the first update on it.

    Args:
        policy: in training mode.
        batch: the rank's first micro-batch, on the policy's device.
        rollouts: whose buffer was just filled.
        limits: of the check.
        strategy: the trainer's.
        reference: where it should be equal to the policy; None else.

    Raises:
        SelfCheckError: they do not, with the likely cause.
    """
    assert rollouts.buffer is not None
    temperature, engine = rollouts.settings.temperature, rollouts.engine
    own, exact = evidence_of(policy, batch, rollouts.buffer.groups, temperature=temperature, reference=reference)
    all_ranks = Evidence(added(strategy, own.sums), added(strategy, own.most, "max"))
    judge(all_ranks, limits, exact=exact and isinstance(engine, HF), engine=type(engine).__name__)


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
