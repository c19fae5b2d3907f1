"""Teachers for the tests of students, and what they read."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.models import zoo

IDS = torch.tensor([[5, 9, 20, 33, 1, 7, 44, 60, 12, 3, 3, 81]])


def teacher(prefix: str, shape: dict[str, Any], seed: int = 0) -> Any:
    """A model of a class prefix of transformers, in eval mode, its weights far from zero."""
    if prefix == "Llama":
        shape.pop("sliding_window")  # unknown to its layers, but not to the key-value cache
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    torch.manual_seed(seed)
    causal = getattr(transformers, f"{prefix}ForCausalLM")
    model = causal._from_config(config_class(**shape), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.1))
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def batches(seed: int = 0) -> list[Any]:
    return [zoo.padded(zoo.documents((7, 3, 9), seed)), zoo.packed(zoo.documents((4, 6), seed + 1))]
