"""The sizes of a model's matrix products, read from the built module, adapters and all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ptl.functional.flops import ModelShape


def model_shape(policy: nn.Module) -> ModelShape:
    """The shape of a Hugging Face causal language model, plain or with an adapter, whole or sharded or quantised.

    Linear layers are counted by their declared sizes: packed 4-bit weights and ZeRO-3's empty shards have others. The
    input embedding is a table, not a product. Experts count by the share of them that a token visits.

    Raises:
        ValueError: the module has no ``config`` with layers and heads.
    """
    config = getattr(policy, "config", None)
    if config is None:
        raise ValueError(f"{type(policy).__name__} has no config to read its layers and heads from")
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    head = _head_modules(policy)
    sums = {(part, trained): 0.0 for part in ("head", "body") for trained in (False, True)}
    for name, module in policy.named_modules():
        if "original_module" in name.split("."):
            continue  # the adapter library's frozen copy of a layer that is trained whole; it is not run
        part = "head" if module in head else "body"
        for weight, size in _products(module, name, config):
            sums[part, weight.requires_grad] += size
    head_parameters = {id(p) for module in head for p in module.parameters(recurse=False)}
    embedding = _call(policy, "get_input_embeddings")
    tied = set() if embedding is None else {id(p) for p in embedding.parameters()}
    flows = any(p.requires_grad for p in policy.parameters() if id(p) not in head_parameters or id(p) in tied)
    full, sliding, window = _attention_widths(config)
    return ModelShape(
        body_frozen=sums["body", False],
        body_trained=sums["body", True],
        head_frozen=sums["head", False],
        head_trained=sums["head", True],
        flows=flows,
        attention=full,
        sliding=sliding,
        window=window,
    )


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """All and trainable parameters, counted once where tied and whole where ZeRO-3 shards them.

    Packed 4-bit weights count as the weights they stand for.
    """
    logical = {
        id(m.weight): m.in_features * m.out_features
        for m in module.modules()
        if isinstance(m, nn.Linear) and not m.weight.is_floating_point()
    }
    total = trained = 0
    for parameter in module.parameters():
        size = logical.get(id(parameter)) or getattr(parameter, "ds_numel", parameter.numel())
        total += size
        trained += size if parameter.requires_grad else 0
    return total, trained


def weight_dtype(policy: nn.Module) -> torch.dtype:
    """The type that most of the model's products are computed in, where no autocast changes it."""
    sizes: dict[torch.dtype, int] = {}
    for module in policy.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            dtype = weight.dtype if weight.is_floating_point() else getattr(module, "compute_dtype", None)
            if dtype is not None:
                sizes[dtype] = sizes.get(dtype, 0) + module.in_features * module.out_features
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def _products(module: nn.Module, name: str, config: Any) -> Iterator[tuple[Tensor, float]]:
    """The weights that a module multiplies tokens with itself, its children's left out, and their active sizes."""
    if isinstance(module, nn.Linear):
        share = _active_experts(config) if "experts" in name.split(".") else 1.0
        yield module.weight, module.in_features * module.out_features * share
    elif isinstance(module, Conv1D):
        yield module.weight, float(module.nx * module.nf)
    else:
        for leaf, parameter in module.named_parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if len(shape) == 3:  # experts in one tensor [experts, out, in]
                yield parameter, shape[0] * shape[1] * shape[2] * _active_experts(config)
            elif len(shape) == 2 and leaf == "weight" and not isinstance(module, nn.Embedding):  # a router
                yield parameter, float(shape[0] * shape[1])


def _active_experts(config: Any) -> float:
    """Share of the routed experts that one token visits."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if isinstance(n := getattr(config, name, None), int) and n > 0), 0)
    active = getattr(config, "num_experts_per_tok", None) or experts
    return active / experts if experts else 1.0


def _head_modules(policy: nn.Module) -> set[nn.Module]:
    """The output embedding and, where an adapter wraps it, the wrapper's parts."""
    head = _call(policy, "get_output_embeddings")
    return set(head.modules()) if isinstance(head, nn.Module) else set()


def _call(policy: nn.Module, method: str) -> Any:
    getter = getattr(policy, method, None)
    if getter is None:
        return None
    try:
        return getter()
    except NotImplementedError:
        return None


def _attention_widths(config: Any) -> tuple[float, float, int]:
    """Attention width of the layers that see everything, of those that see a window, and the window."""
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not layers or not heads:
        raise ValueError(f"{type(config).__name__} names no num_hidden_layers and num_attention_heads")
    query = getattr(config, "head_dim", None) or config.hidden_size // heads
    value = query
    if getattr(config, "kv_lora_rank", None):  # latent attention: the key has a rotary part that the value lacks
        query, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = heads * (query + value) / 2
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    full = sum(kind == "full_attention" for kind in kinds)
    sliding = sum(kind in ("sliding_attention", "chunked_attention") for kind in kinds)
    if not window and sliding:
        full, sliding = full + sliding, 0
    return width * full, width * sliding, window if sliding else 0
