"""What the device could do, and what the process took of it."""

from __future__ import annotations

import resource
import sys
from typing import Any

import lightning as L
import torch
from torch import nn

from ptl.callbacks.shape import weight_dtype
from ptl.functional.flops import peak_flops


def compute_dtype(trainer: L.Trainer, policy: Any) -> str:
    """The type that products are computed in, as the table of peaks names it."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return "bf16"
    if precision.startswith("16"):
        return "fp16"
    dtype = weight_dtype(policy) if isinstance(policy, nn.Module) else torch.float32
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16" if dtype == torch.bfloat16 else "fp16"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def device_peak(device: torch.device, dtype: str) -> float | None:
    """Dense peak of a device in operations a second, or None: a CPU, or a device that is not in the table."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Bytes: most that was reserved on a CUDA device, else most that was resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
