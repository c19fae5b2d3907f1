"""Frozen weights in 4 or 8 bits through bitsandbytes: what to ask for, what it can take, and the way back to floats."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

KEEP = ["lm_head", "score", "embed_out"]
"""Output heads, which stay in floats: they are small, and both loss and reward read them directly."""

_NF4_STATE = ".quant_state.bitsandbytes__nf4"
_INT8_SCALE = "SCB"


def quantization_config(kind: Literal["nf4", "int8"], compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What to pass to ``from_pretrained``.

    nf4 has double quantisation of its scales (QLoRA, arXiv:2305.14314, section 3) and keeps its codes as uint8:
    DeepSpeed casts every float parameter to its engine's dtype, which would destroy codes that are kept as floats.
    int8 keeps outlier features in 16 bits (LLM.int8(), arXiv:2208.07339).

    Arguments:
        kind: ``nf4`` or ``int8``.
        compute_dtype: what nf4 weights are dequantised to for a matrix product.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"quantize {kind} needs bitsandbytes: install ptl[quantize], or remove policy.quantize")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEEP)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=KEEP,
    )


def keep_codes_in_place(model: nn.Module) -> None:
    """Makes a quantised model compute the same after an evaluation as before it.

    On a CPU with AVX512-BF16, a bitsandbytes 0.50 layer that runs once in eval mode repacks its 4-bit codes in place
    for a kernel that has no backward pass, and keeps them so in training mode: after the first validation no gradient
    passes through the layer, with no error. The repacking also fails where a row is not a multiple of 64 long, and
    rounds the scales. Layers are told that the CPU lacks the instruction; other devices never take that path.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is a bitsandbytes code."""
    return any(type(p).__name__ in ("Params4bit", "Int8Params") for p in model.parameters())


def dequantize_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict with every nf4 or int8 weight replaced by the float matrix that the layer computes with.

    Arguments:
        state: as ``state_dict`` gives it, also when gathered from ZeRO ranks: codes, and their scales beside them.

    Returns:
        The entries that a plain model has, in its names; floats are passed through unchanged, dequantised weights are
        in nf4's own output dtype, or float32 for int8.

    Raises:
        ValueError: codes without their scales.
    """
    nf4 = {key.removesuffix(_NF4_STATE) for key in state if key.endswith(_NF4_STATE)}
    scales = {key for key in state if key.rpartition(".")[2] == _INT8_SCALE}
    int8 = {f"{key.removesuffix(_INT8_SCALE)}weight": key for key in scales}
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in nf4:
            out[key] = _dequantize_nf4(key, state)
        elif key in int8:
            out[key] = state[key].float() * (state[int8[key]].float() / 127.0)[:, None]
        elif key in scales or key.rpartition(".")[2] == "weight_format" or _is_statistic(key, nf4):
            continue
        elif isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.int8):
            raise ValueError(f"{key} holds quantised codes but the state dict has no scales for them")
        else:
            out[key] = value
    return out


def _is_statistic(key: str, nf4: set[str]) -> bool:
    """Whether an entry such as ``q_proj.weight.absmax`` belongs to an nf4 weight."""
    parts = key.split(".")
    return any(".".join(parts[:cut]) in nf4 for cut in range(len(parts) - 1, 0, -1))


def _dequantize_nf4(key: str, state: Mapping[str, Any]) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    codes = state[key]
    statistics = {k.removeprefix(f"{key}."): v for k, v in state.items() if k.startswith(f"{key}.")}
    return dequantize_4bit(codes, QuantState.from_dict(statistics, device=codes.device))
