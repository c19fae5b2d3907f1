"""Floating-point operations of a training step, by arithmetic, and what a device could do at most.

A matrix product of a token with a weight of n entries costs 2n operations forward, 2n for the gradient of its input and
2n for the gradient of the weight. Hence 6N for full fine-tuning and 4 N_frozen + 6 N_lora for LoRA: no gradient is made
for a frozen weight. The product with attention width w over a document of l tokens costs 4 w l^2 forward and 8 w l^2
backward. Causality is not discounted and recomputation is not counted (PaLM, arXiv:2204.02311, appendix B), so that
the number says what the model needs, not what a kernel or a checkpointing policy happens to do. Only the operations of
adapters, quantisation and norms that are not matrix products are left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a causal language model's matrix products.

    Attributes:
        body_frozen: weights applied to every token that get no gradient; an expert counts by the share of
            tokens it sees.
        body_trained: weights applied to every token that are trained, LoRA's matrices among them.
        head_frozen: weights of the output embedding, applied where the loss needs logits, that get no gradient.
        head_trained: the same, trained.
        flows: a gradient flows through the body, because something in it (or the input embedding) is trained.
        attention: sum over layers with full attention of heads x (query width + value width) / 2.
        sliding: the same over layers that see a window of the latest tokens.
        window: that window's tokens; 0 where there is no such layer.
    """

    body_frozen: float = 0.0
    body_trained: float = 0.0
    head_frozen: float = 0.0
    head_trained: float = 0.0
    flows: bool = True
    attention: float = 0.0
    sliding: float = 0.0
    window: int = 0


class Work(NamedTuple):
    """What a number of batches asked of the model.

    Attributes:
        tokens: real tokens, padding left out.
        head_tokens: positions where the output embedding is applied.
        pairs: sum over documents of length squared.
        sliding_pairs: sum over documents of length x min(length, window).
    """

    tokens: float
    head_tokens: float
    pairs: float = 0.0
    sliding_pairs: float = 0.0


def forward_flops(shape: ModelShape, work: Work) -> float:
    """Operations of a forward pass: 2N + 4A."""
    body = shape.body_frozen + shape.body_trained
    head = shape.head_frozen + shape.head_trained
    attention = shape.attention * work.pairs + shape.sliding * work.sliding_pairs
    return 2 * body * work.tokens + 2 * head * work.head_tokens + 4 * attention


def training_flops(shape: ModelShape, work: Work) -> float:
    """Operations of a forward and a backward pass.

    Full fine-tuning 6N + 12A, LoRA and QLoRA 4 N_frozen + 6 N_lora + 12A, a head alone 2 N_body + 4 N_head + 4A, with
    the head's share counted on ``head_tokens`` and A summed over documents. Layers below the first trained one are
    counted as if the gradient flowed through them.
    """
    flops = forward_flops(shape, work)
    if shape.flows:
        flops += forward_flops(shape, work)
        # The backward pass of attention makes gradients for both of its operands.
        flops += 4 * (shape.attention * work.pairs + shape.sliding * work.sliding_pairs)
    return flops + 2 * shape.body_trained * work.tokens + 2 * shape.head_trained * work.head_tokens


class Peak(NamedTuple):
    """Dense operations a second of a device, by the type that is multiplied; None where it has no such unit."""

    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float | None


def _tensor_core(half: float, tf32: float, fp32: float) -> Peak:
    return Peak(bf16=half, fp16=half, tf32=tf32, fp32=fp32)


# Vendors' data sheets, without sparsity, with fp32 accumulation. The first pattern that matches decides.
PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bGB200\b", _tensor_core(2.5e15, 1.25e15, 80e12)),
    (r"\bB200\b", _tensor_core(2.25e15, 1.12e15, 75e12)),
    (r"\bH(100|200) NVL\b", _tensor_core(835e12, 417e12, 60e12)),
    (r"\bH100 PCIe\b", _tensor_core(756e12, 378e12, 51.2e12)),
    (r"\b(H100|H200|H800|GH200)\b", _tensor_core(989.4e12, 494.7e12, 66.9e12)),
    (r"\bH20\b", _tensor_core(148e12, 74e12, 44e12)),
    (r"\bA(100|800)\b", _tensor_core(312e12, 156e12, 19.5e12)),
    (r"\bMI3(00|25)X\b", _tensor_core(1307.4e12, 653.7e12, 163.4e12)),
    (r"\bMI250X\b", Peak(bf16=191.5e12, fp16=191.5e12, tf32=None, fp32=47.9e12)),
    (r"\bL40S\b", _tensor_core(362e12, 183e12, 91.6e12)),
    (r"\bL40\b", _tensor_core(181e12, 90.5e12, 90.5e12)),
    (r"\bL4\b", _tensor_core(121e12, 60e12, 30.3e12)),
    (r"\bA40\b", _tensor_core(149.7e12, 74.8e12, 37.4e12)),
    (r"\bA30\b", _tensor_core(165e12, 82e12, 10.3e12)),
    (r"\bA10G\b", _tensor_core(70e12, 35e12, 35e12)),
    (r"\bA10\b", _tensor_core(125e12, 62.5e12, 31.2e12)),
    (r"\bRTX A6000\b", _tensor_core(154.8e12, 77.4e12, 38.7e12)),
    (r"\bRTX 6000 Ada\b", _tensor_core(364.2e12, 182.1e12, 91.1e12)),
    (r"\bRTX 4090\b(?! (D|Laptop))", _tensor_core(165.2e12, 82.6e12, 82.6e12)),
    (r"\bRTX 3090\b(?! Ti)", _tensor_core(71e12, 35.6e12, 35.6e12)),
    (r"\bV100\b", Peak(bf16=None, fp16=125e12, tf32=None, fp32=15.7e12)),
    (r"\bT4\b", Peak(bf16=None, fp16=65e12, tf32=None, fp32=8.1e12)),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in operations a second, or None when it is not known for sure.

    A slice of a device (MIG) is not known: its share of the units is not in its name.

    Arguments:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        dtype: ``bf16``, ``fp16``, ``tf32`` or ``fp32``: the type that is multiplied.
    """
    if dtype not in Peak._fields:
        raise ValueError(f"dtype must be one of {', '.join(Peak._fields)}, got {dtype!r}")
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peak in PEAKS:
        if re.search(pattern, device_name, flags=re.IGNORECASE):
            return getattr(peak, dtype)
    return None
