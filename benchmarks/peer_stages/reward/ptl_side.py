"""The objective of ``ptl`` for rankings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.peer_tools import lightning_run
from benchmarks.peer_tools.compare import Measured
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.reward import RewardModeling
from ptl.types import GroupBatch


def objective_of(spec: Mapping[str, Any]) -> RewardModeling:
    """The objective by its public arguments."""
    adapter = LoRA(rank=16, alpha=32) if spec["adapter"] == "lora" else None
    return RewardModeling(
        ModelSpec(name=spec["scored"], adapter=adapter, **lightning_run.model_of(spec)),
        share_prompt=spec["share_prompt"],
        **lightning_run.rates_of(spec),
    )


def work_of(batch: GroupBatch) -> tuple[Tensor, Tensor, int]:
    """Lengths of both documents of every pair, the pairs, and the tokens that go through the model."""
    lengths = batch.tokens.position_ids.flatten()[batch.last] + 1
    pairs = batch.pairs[:, batch.prompt_weights[batch.pair_prompts] > 0]
    return lengths[pairs].flatten(), (pairs[0] >= 0).sum(), batch.tokens.input_ids.numel()


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""
    settings = {"answers": spec["answers"], "share_prompt": spec["share_prompt"]}
    return lightning_run.fit(spec, objective_of(spec), settings=settings, work_of=work_of)
