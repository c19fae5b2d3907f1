"""The objective of ``ptl`` for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peer_tools import lightning_run
from benchmarks.peer_tools.compare import Measured
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.lora import LoRASFT
from ptl.objectives.sft import SFT


def objective_of(spec: Mapping[str, Any]) -> SFT:
    """The objective by its public arguments."""
    adapter = LoRA(rank=16, alpha=32, dtype=spec["lora_dtype"]) if spec["adapter"] == "lora" else None
    policy = ModelSpec(name=spec["model"], adapter=adapter, **lightning_run.model_of(spec))
    return (LoRASFT if adapter else SFT)(policy, **lightning_run.rates_of(spec))


def run(spec: Mapping[str, Any]) -> Measured:
    """One measured run in this process."""
    adapter_dtype = spec["lora_dtype"] if spec["adapter"] == "lora" else None
    return lightning_run.fit(spec, objective_of(spec), settings={"adapter_dtype": adapter_dtype})
