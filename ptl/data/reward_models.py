"""Reward models by name: whether a name is one, and what its scores need beside its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ptl.data.render import Renderer
    from ptl.models.names import Found
    from ptl.models.spec import Quantization


@dataclass(frozen=True)
class RewardModel:
    """A reward model that is ready to score.

    Attributes:
        name: as the user wrote it.
        model: in eval mode, with a scalar head in fp32.
        renderer: prints conversations as in its training.
        facts: what ``ptl_reward.json`` says; None where there is none.
        max_length: most tokens that it holds.
    """

    name: str
    model: nn.Module
    renderer: Renderer
    facts: dict[str, Any] | None
    max_length: int


def is_reward_model(found: Found) -> bool:
    """Whether a model gives one number a sequence, by its configuration; nothing is loaded.

    Raises:
        ValueError: the configuration cannot be read.
    """
    config = _config(found)
    if found.adapter:
        return config.get("task_type") == "SEQ_CLS"
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def _config(found: Found) -> dict[str, Any]:
    if found.adapter:
        return json.loads((Path(found.name) / "adapter_config.json").read_text(encoding="utf-8"))
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(found.name)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the model {found.name!r}: {' '.join(str(error).split())[:300]}") from error


def load_reward_model(
    found: Found, *, quantized: bool = True, quantize: Quantization | None = None, device: str = "cpu"
) -> nn.Module:
    """A reward model in eval mode.

    Arguments:
        found: what to load; ``is_reward_model`` holds.
        quantized: keep an adapter's base in the codes it was trained on.
        quantize: make codes of its linear layers; None leaves them as they are.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one; codes stay where they were made.

    Raises:
        ValueError: it cannot be loaded, with the reason.
    """
    import torch

    from ptl.models.adapters import load_adapter
    from ptl.models.build import load_base
    from ptl.models.names import base_spec
    from ptl.models.quantize import is_quantized

    spec = base_spec(found, quantized=quantized)
    spec = replace(spec, head="scalar", attention="packed", quantize=quantize or spec.quantize)
    model: Any = load_base(spec)
    if found.adapter:
        model = load_adapter(model, Path(found.name))
    coded = is_quantized(model)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return (model if coded else model.to(device)).eval()


def open_reward_model(name: str, *, quantize: Quantization | None = None, device: str = "auto") -> RewardModel:
    """A reward model by run folder, export, adapter folder or hub name, with its renderer.

    Arguments:
        name: of the model.
        quantize: as in ``load_reward_model``.
        device: as in ``load_reward_model``.

    Raises:
        ValueError: no such model, no reward model, no chat template, or a tokenizer or template other than the one that
            it was trained with.
    """
    found = find_reward_model(name)
    renderer, facts = reward_renderer(found.name)
    model = load_reward_model(found, quantize=quantize, device=device)
    return RewardModel(name, model, renderer, facts, longest(model))


def find_reward_model(name: str) -> Found:
    """What a reward model's name stands for; of its files the configuration alone is read.

    Raises:
        ValueError: no such model, no reward model, a classifier of several labels, or an adapter whose base is gone.
    """
    from ptl.models.build import find_source
    from ptl.models.names import base_spec, resolve_model

    found = resolve_model(name)
    if not is_reward_model(found):
        raise ValueError(
            f"{name} is no reward model: its configuration names no ...ForSequenceClassification; a run of "
            "ptl.objectives.reward.RewardModeling makes one"
        )
    labels = len(_config(found).get("id2label") or (1,))
    if labels > 1:
        raise ValueError(
            f"{name} is no reward model: it is a classifier of {labels} labels, and a reward is one number"
        )
    find_source(base_spec(found).name)
    return found


def reward_renderer(folder: str) -> tuple[Renderer, dict[str, Any] | None]:
    """The renderer of a reward model, which prints as in its training, and its facts.

    Raises:
        ValueError: as ``open_reward_model``.
    """
    from ptl.data.render import Renderer
    from ptl.data.reward_facts import read_reward_facts, render_policy
    from ptl.data.tokenizer import load_tokenizer

    facts = read_reward_facts(folder)
    renderer = Renderer(load_tokenizer(folder), policy=render_policy(facts))
    if not renderer.template:
        raise ValueError(f"{folder} has no chat template, so no conversation can be scored: add one to its tokenizer")
    read_reward_facts(folder, renderer)
    return renderer, facts


def longest(model: nn.Module) -> int:
    """Most positions that a model was made for."""
    from ptl.models.adapters import base_model

    config = base_model(model).config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)
