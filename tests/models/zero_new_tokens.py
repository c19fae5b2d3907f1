"""The two ranks of the new tokens' ZeRO-3 test: each kind of training, beside one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ptl.models.adapters import load_adapter
from ptl.models.build import load_base
from ptl.models.export import largest_logit_change
from ptl.models.spec import ModelSpec
from tests.models import test_new_tokens
from tests.models.zero_build import alone, sharded
from tests.ranks import rank, start_deepspeed


def matrix(folder: str, out: str) -> dict[str, Any]:
    """For each tie and kind of training: both runs' losses; on rank 0 how far the exports are from the lone model."""
    start_deepspeed()
    results = {}
    ids = torch.tensor(test_new_tokens.IDS)
    for tie in (True, False):
        for kind in test_new_tokens.KINDS:
            name = f"{tie} {kind}"
            spec = test_new_tokens.spec_of(Path(folder) / str(tie), kind)
            place = Path(out) / name
            expected, model = alone(spec, ids)
            result = sharded(spec, place / "merged", ids, place / "adapter" if spec.adapter else None)
            result["expected"] = expected
            if rank() == 0:
                merged = AutoModelForCausalLM.from_pretrained(place / "merged")
                result["merged"] = largest_logit_change(model, merged, test_new_tokens.IDS)
                if spec.adapter:
                    base = load_base(ModelSpec(name=spec.name, quantize=spec.quantize))
                    again = load_adapter(base, place / "adapter")
                    result["adapter"] = largest_logit_change(model, again, test_new_tokens.IDS)
            results[name] = result
    return results
