"""The objective of ``ptl`` for reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.peer_stages.grpo import rule
from benchmarks.peer_tools import lightning_run
from benchmarks.peer_tools.compare import Measured
from ptl.functional.policy_loss import PolicyLoss
from ptl.models.spec import ModelSpec
from ptl.objectives.grpo import GRPO
from ptl.rewards.base import Completion, Outcome, Reward
from ptl.rollout.engine import Engine
from ptl.rollout.hf import HF
from ptl.rollout.hf_cb import HFContinuous
from ptl.rollout.selfcheck import SelfCheck
from ptl.rollout.settings import Rollout
from ptl.rollout.vllm import VLLM
from ptl.types import RolloutBatch


class Rule(Reward):
    """The rule as a reward."""

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [rule(completion.text) for completion in completions]


def engine_of(spec: Mapping[str, Any]) -> Engine:
    """What draws; vLLM takes no longer answers than the rows need, as the peer's."""
    if spec["engine"] == "vllm":
        return VLLM(max_model_len=spec["max_length"])
    return HFContinuous() if spec["engine"] == "continuous" else HF()


def objective_of(spec: Mapping[str, Any]) -> GRPO:
    """The objective by its public arguments."""
    return GRPO(
        ModelSpec(name=spec["model"], dtype=lightning_run.weights_of(spec)),
        [Rule()],
        engine=engine_of(spec),
        rollout=Rollout(group_size=spec["answers"], max_new_tokens=spec["new_tokens"], seed=spec["seed"]),
        loss=PolicyLoss(kind="dapo"),
        self_check=SelfCheck(min_finished=0.0),  # no answer can end
        **lightning_run.rates_of(spec),
    )


def work_of(batch: RolloutBatch) -> tuple[Tensor, Tensor, int]:
    """Lengths of the answers with their prompts, the answers' tokens, and those that go through the trained pass."""
    answers = batch.answers
    lengths = answers.tokens.position_ids.flatten()[answers.last] + 1
    return lengths, answers.lengths.new_tensor(len(answers.targets)), answers.tokens.input_ids.numel()


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""
    settings = {"group_size": spec["answers"], "max_new_tokens": spec["new_tokens"], "engine": spec["engine"]}
    return lightning_run.fit(spec, objective_of(spec), settings=settings, work_of=work_of)
