"""What a rank of ``test_students`` runs: students made of a teacher that ZeRO-3 shards while it is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ptl.models.importance import layer_importance
from ptl.models.spec import LoRA, ModelSpec, Shrink
from tests.models.zero_build import IDS, STAGE_3, alone, sharded
from tests.ranks import rank, start_deepspeed


def specs(folder: str) -> dict[str, ModelSpec]:
    base = ModelSpec(name=folder, attention="sdpa")
    layers = replace(base, shrink=Shrink(layers=[0, 2, 3]))
    return {
        "layers": layers,
        "adapter": replace(layers, adapter=LoRA(rank=4)),
        "width": replace(base, shrink=Shrink(layers=2, intermediate_size=20, heads=2)),
        "channels": replace(base, shrink=Shrink(layers=2, hidden_size=64)),
    }


@torch.no_grad()
def compare(folder: str, out: str) -> dict[str, Any]:
    """For each spec, on every rank: both runs' losses; on rank 0 also the export's distance from the lone student."""
    start_deepspeed()
    results: dict[str, Any] = {}
    for name, spec in specs(folder).items():
        with torch.enable_grad():
            expected, model = alone(spec)
            result = sharded(spec, Path(out) / name)
        result["expected"] = expected
        if rank() == 0:
            again = AutoModelForCausalLM.from_pretrained(Path(out) / name)
            one, other = (m(input_ids=IDS, use_cache=False).logits for m in (model, again))
            result["export"] = (one - other).abs().max().item()
        results[name] = result
    announced = HfDeepSpeedConfig(STAGE_3)
    try:
        layer_importance(ModelSpec(name=folder, attention="sdpa").build(), [])
    except ValueError as error:
        results["refusal"] = str(error)
    finally:
        unset_hf_deepspeed_config()
        del announced
    return results
