"""What the ranks of ``test_frozen`` run."""

from __future__ import annotations

from typing import Any

import torch

from tests.ranks import start_deepspeed


def passes(folder: str, count: int) -> dict[str, Any]:
    """How far a sharded model is from a whole one in each pass, and how many layers DeepSpeed has noted after it."""
    from transformers import AutoModelForCausalLM

    from ptl.strategies.frozen import ShardedModel

    start_deepspeed()
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    sharded = ShardedModel(lambda: AutoModelForCausalLM.from_pretrained(folder))
    coordinator = sharded._engine.optimizer.get_param_coordinator()
    worst, noted = [], []
    for number in range(count):
        ids = torch.arange(8)[None] + number
        sharded.begin()
        with torch.no_grad():
            states = [model.model(input_ids=ids).last_hidden_state for model in (sharded.model, whole)]
        worst.append(float((states[0] - states[1]).abs().max()))
        noted.append(len(coordinator._PartitionedParameterCoordinator__submodule_order))
    away = sum(p.numel() for p in sharded.model.parameters())
    sharded.close()
    return {"worst": worst, "noted": noted, "held": away, "whole": sum(p.numel() for p in whole.parameters())}
