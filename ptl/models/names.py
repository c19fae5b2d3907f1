"""What a model's name stands for: a run folder, an export, an adapter, a model folder, a GGUF file or a hub name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptl.models.spec import ModelSpec

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
        name: a run folder (its ``export``), an exported or other model folder, an adapter folder, a GGUF file as
            ``ModelSpec.name`` takes it, or a hub name.
        adapter: of a run folder, take its adapter where it has one.

    Raises:
        ValueError: a folder that holds no model, or a path that is not there.
    """
    from ptl.models.gguf import is_gguf, plain_folder

    if is_gguf(name):
        return Found(str(plain_folder(name)), False)
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


def base_spec(found: Found, *, dtype: str = "auto", quantized: bool = True) -> ModelSpec:
    """What the plain model is loaded from: itself, or the base of an adapter as it was in training.

    Arguments:
        found: a model or an adapter.
        dtype: ``bf16``, ``fp32``, ``fp16`` or ``auto``, the one of training or of the checkpoint.
        quantized: keep an adapter's base in the codes it was trained on.

    Raises:
        ValueError: an adapter that names no base.
    """
    from ptl.models.adapters import read_adapter_base
    from ptl.models.export import BASE_FILE
    from ptl.models.spec import LoRA, ModelSpec

    if not found.adapter:
        return ModelSpec(name=found.name, dtype=dtype, attention="sdpa")  # pyright: ignore[reportArgumentType]
    folder = Path(found.name)
    beside = folder / BASE_FILE
    facts = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    codes = facts.get("quantize") if quantized else None
    return ModelSpec(
        name=facts.get("name") or read_adapter_base(folder),
        dtype=facts.get("dtype", "auto") if dtype == "auto" else dtype,  # pyright: ignore[reportArgumentType]
        attention="sdpa",
        quantize=codes,
        adapter=LoRA() if codes else None,  # codes alone would train nothing, which a spec refuses
        head=facts.get("head", "lm"),
        revision=facts.get("revision"),
    )
