"""Merging an adapter's weights into the base's, on state dicts alone: no module is made or changed.

Names are those of a model that peft wrapped: ``base_model.model.<module>.lora_A.default.weight`` beside
``base_model.model.<module>.base_layer.weight``. They come out as a plain model's: ``<module>.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ADAPTER = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """How one layer's adapter is added.

    Attributes:
        scale: what B A is multiplied by.
        transposed: the base keeps its matrix as [in, out] (``Conv1D``).
        embedding: the layer is an embedding, whose matrix is [rows, out].
    """

    scale: float
    transposed: bool = False
    embedding: bool = False


def merge(
    state: Mapping[str, Tensor],
    *,
    layers: Mapping[str, MergedLayer],
    rows: Mapping[str, Sequence[int]],
    base: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weights of a plain model that computes what the adapted one does.

    LoRA: W + s B A. DoRA: m (W + s B A) / |W + s B A|, each output row on its own (arXiv:2402.09353, equation 5).
    Trained rows replace those of their matrix; modules trained whole replace the originals.

    Arguments:
        state: whole state dict of the adapted model, in floats.
        layers: adapted layers by plain module name.
        rows: trained rows of embeddings and heads by plain module name.
        base: weights to merge onto, in plain names; those in ``state`` by default.

    Returns:
        Plain name -> weight; what an adapter touched is float32.

    Raises:
        ValueError: a base weight that is in neither mapping.
    """
    plain = {name: tensor for key, tensor in state.items() if (name := _plain_name(key, state)) is not None}
    if base is not None:
        plain |= {name: tensor for name, tensor in base.items() if not _trained_whole(name, state)}
    for name, layer in layers.items():
        plain[f"{name}.weight"] = _merged(_weight(plain, name), state, f"{_PREFIX}{name}.", layer)
    for name, indices in rows.items():
        weight = _weight(plain, name).float()
        values = state[f"{_PREFIX}{name}.token_adapter.trainable_tokens_delta.{ADAPTER}"].to(weight)
        plain[f"{name}.weight"] = weight.index_copy(0, torch.tensor(list(indices), device=weight.device), values)
    return plain


def _plain_name(key: str, state: Mapping[str, Tensor]) -> str | None:
    """The name a plain model gives to an entry of a wrapped one; None for what the adapter added."""
    name = key.removeprefix(_PREFIX)
    if ".lora_" in name or ".trainable_tokens_" in name:
        return None
    if ".original_module." in name:
        trained = key.replace(".original_module.", f".modules_to_save.{ADAPTER}.")
        return None if trained in state else name.replace(".original_module.", ".")
    name = name.replace(f".modules_to_save.{ADAPTER}.", ".")
    return name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")


def _trained_whole(name: str, state: Mapping[str, Tensor]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return f"{_PREFIX}{owner}.modules_to_save.{ADAPTER}.{leaf}" in state


def _weight(plain: Mapping[str, Tensor], name: str) -> Tensor:
    if f"{name}.weight" not in plain:
        raise ValueError(
            f"the state dict lacks the base weight {name}.weight: gather every parameter, or save the adapter alone "
            "and merge it with `ptl export`"
        )
    return plain[f"{name}.weight"]


def _merged(weight: Tensor, state: Mapping[str, Tensor], prefix: str, layer: MergedLayer) -> Tensor:
    """One layer's merged matrix, float32, in the layout of ``weight``."""
    if layer.embedding:
        a, b = (state[f"{prefix}lora_embedding_{matrix}.{ADAPTER}"].float() for matrix in "AB")
        return weight.float() + layer.scale * (b @ a).T.to(weight.device)
    a, b = (state[f"{prefix}lora_{matrix}.{ADAPTER}.weight"].float() for matrix in "AB")
    merged = (weight.T if layer.transposed else weight).float() + layer.scale * (b @ a).to(weight.device)
    magnitude = state.get(f"{prefix}lora_magnitude_vector.{ADAPTER}.weight")
    if magnitude is not None:
        merged = merged * (magnitude.to(merged) / merged.norm(dim=1))[:, None]
    return merged.T.contiguous() if layer.transposed else merged
