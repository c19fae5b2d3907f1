"""What a rank of ``test_build`` runs: specs built inside ZeRO-3, trained a few steps and exported; the same without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ptl.models.export import export
from ptl.models.spec import LoRA, ModelSpec
from tests import tiny
from tests.models.zero_heads import STAGE_3
from tests.ranks import rank, start_deepspeed

IDS = torch.tensor([[5, 9, 20, 33, 1, 7], [100, 101, 3, 11, 5, 8]])
STEPS, LR = 3, 0.1


def specs(folder: str) -> dict[str, ModelSpec]:
    base = ModelSpec(name=folder, attention="sdpa")
    lora = replace(base, adapter=LoRA(rank=4))
    return {
        "full": base,
        "recomputed": replace(lora, gradient_checkpointing=True),
        "dora": replace(base, adapter=LoRA(rank=4, dora=True)),
        "pissa": replace(base, adapter=LoRA(rank=4, init="pissa")),
        "rows": replace(base, adapter=LoRA(rank=4, train_tokens=[1, 5])),
        "matrix": replace(base, adapter=LoRA(rank=4, save_modules=["embed_tokens"])),
        "scalar": replace(lora, head="scalar"),
        "nf4": replace(lora, quantize="nf4"),
        "nf4 rows": replace(base, adapter=LoRA(rank=4, train_tokens=[1, 5]), quantize="nf4"),
    }


def objective(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if logits.shape[-1] == 1:
        return 0.02 * (logits - 0.3).pow(2).mean()  # a larger step would overshoot
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def alone(spec: ModelSpec, ids: torch.Tensor = IDS) -> tuple[list[float], nn.Module]:
    """Losses of one process that never heard of ZeRO, and its model."""
    torch.manual_seed(0)
    model, losses = spec.build(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    for _ in range(STEPS):
        loss = objective(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.eval()


def sharded(spec: ModelSpec, out: Path, ids: torch.Tensor = IDS, adapter: Path | None = None) -> dict[str, Any]:
    """Losses of the two ranks on the same rows, and how much was sharded while it was loaded; rank 0 exports."""
    announced = HfDeepSpeedConfig(STAGE_3)
    try:
        torch.manual_seed(0)
        model, losses = spec.build(), []
        at_load = [name for name, p in model.named_parameters() if hasattr(p, "ds_id")]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=announced.config)
        for _ in range(STEPS):
            loss = objective(engine, ids)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if rank() == 0:
            export(model, tiny.make_tokenizer(), out, state_dict=state)
            if adapter is not None:
                export(model, tiny.make_tokenizer(), adapter, state_dict=state, merged=False, spec=spec)
        torch.distributed.barrier()
    finally:
        unset_hf_deepspeed_config()
    return {"losses": losses, "sharded": len(at_load), "adapter sharded": any("lora_" in name for name in at_load)}


@torch.no_grad()
def compare(folder: str, out: str) -> dict[str, Any]:
    """For each spec, on every rank: both runs' losses; on rank 0 also the export's distance from the lone model."""
    start_deepspeed()
    results = {}
    for index, (name, spec) in enumerate(specs(folder).items()):
        with torch.enable_grad():
            expected, model = alone(spec)
            result = sharded(spec, Path(out) / str(index))
        result["expected"] = expected
        if rank() == 0:
            auto = AutoModelForSequenceClassification if spec.head == "scalar" else AutoModelForCausalLM
            again = auto.from_pretrained(Path(out) / str(index))
            one, other = (m(input_ids=IDS, use_cache=False).logits for m in (model, again))
            result["export"] = (one - other).abs().max().item()
        results[name] = result
    return results
