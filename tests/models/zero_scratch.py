"""The two ranks of the test of models from scratch: built and trained under ZeRO-2 and ZeRO-3, and by one process."""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.models import test_scratch
from tests.models.zero_build import IDS, LR, STEPS, alone, objective
from tests.models.zero_heads import STAGE_3
from tests.ranks import start_deepspeed


def whole(model: nn.Module) -> Any:
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    with whole(model):
        for name, p in sorted(model.named_parameters()):
            found.update(name.encode() + p.detach().numpy().tobytes())
    return found.hexdigest()


def under(stage: int, spec: Any) -> tuple[str, list[float], dict[str, torch.Tensor]]:
    """Digest of the first weights, losses, and the last weights, whole on each rank."""
    settings = copy.deepcopy(STAGE_3)
    settings["zero_optimization"] = {**settings["zero_optimization"], "stage": stage}
    announced = HfDeepSpeedConfig(settings) if stage == 3 else None
    try:
        torch.manual_seed(0)
        model, losses = spec.build(), []
        first = digest(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        for _ in range(STEPS):
            loss = objective(engine, IDS)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        with whole(model):
            return first, losses, {name: p.detach().clone() for name, p in model.named_parameters()}
    finally:
        if announced is not None:
            unset_hf_deepspeed_config()


def stages(folder: str, out: str) -> dict[str, Any]:
    start_deepspeed()
    spec = test_scratch.spec(Path(folder))
    torch.manual_seed(0)
    first = {"1 process": digest(spec.build())}
    expected, model = alone(spec)
    losses, change = {"1 process": expected}, {}
    for stage in (2, 3):
        first[str(stage)], losses[str(stage)], last = under(stage, spec)
        change[str(stage)] = max((last[name] - p).abs().max().item() for name, p in model.named_parameters())
    return {"first": first, "losses": losses, "change": change}
