"""Finds and loads the model that a person names: run folder, export, adapter, Hugging Face folder or hub name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_PLAIN, _ADAPTER = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Found:
    """A model on this machine or a hub name.

    Attributes:
        name: folder or hub name of the plain model, or of the adapter.
        adapter: whether ``name`` is an adapter, which needs its base.
    """

    name: str
    adapter: bool


def resolve_model(name: str, *, adapter: bool = False) -> Found:
    """What a name stands for.

    Arguments:
        name: a run folder (its ``export``), an exported or other model folder, an adapter folder, or a hub name.
        adapter: of a run folder, take its adapter where it has one.

    Raises:
        ValueError: a folder that holds no model, or a path that is not there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        order = ("export_adapter", "export") if adapter else ("export", "export_adapter")
        for folder in (path, *(path / part for part in order)):
            if (folder / _ADAPTER).is_file():
                return Found(str(folder), True)
            if (folder / _PLAIN).is_file():
                return Found(str(folder), False)
        raise ValueError(
            f"{name} holds no model: expected a run folder with export/, or a folder with config.json or "
            "adapter_config.json; a run writes export/ when its training ends"
        )
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"no folder {name!r}: expected a run folder, a model folder or a hub name")
    return Found(name, False)


def load_model(found: Found, *, dtype: str = "auto", quantized: bool = True) -> nn.Module:
    """The model in eval mode, with its adapter on it where it is one.

    Arguments:
        found: what to load.
        dtype: ``bf16``, ``fp32``, ``fp16`` or ``auto``, the checkpoint's own.
        quantized: load an adapter's base in the codes it was trained on.

    Raises:
        ValueError: it cannot be loaded, with the reason.
    """
    from transformers import AutoModelForCausalLM

    import ptl.models.attention  # noqa: F401  registers the implementation
    from ptl.models.adapters import load_adapter, read_adapter_base
    from ptl.models.build import find_source
    from ptl.models.export import BASE_FILE, DTYPES
    from ptl.models.quantize import quantization_config

    facts: dict[str, Any] = {}
    name = found.name
    if found.adapter:
        beside = Path(found.name) / BASE_FILE
        facts = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        name = read_adapter_base(Path(found.name))
    kind = facts.get("dtype", "auto") if dtype == "auto" else dtype
    options: dict[str, Any] = {"dtype": DTYPES.get(kind, "auto"), "attn_implementation": "ptl_packed"}
    if quantized and facts.get("quantize"):
        import torch

        options["quantization_config"] = quantization_config(facts["quantize"], DTYPES.get(kind, torch.bfloat16))
    try:
        model = AutoModelForCausalLM.from_pretrained(find_source(name), use_safetensors=True, **options)
    except OSError as error:
        raise ValueError(f"cannot load {name!r}: {' '.join(str(error).split())[:300]}") from error
    return (load_adapter(model, Path(found.name)) if found.adapter else model).eval()
