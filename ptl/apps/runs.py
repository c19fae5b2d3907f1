"""Loads the model that a person names, ready to answer."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ptl.models.names import Found


def quiet_libraries() -> None:
    """Keeps start-up notes of bitsandbytes and DeepSpeed, which mean nothing here, from between the lines of an app."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def load_model(found: Found, *, dtype: str = "auto", quantized: bool = True, device: str = "cpu") -> nn.Module:
    """The model in eval mode, with its adapter on it where it is one.

    Arguments:
        found: what to load.
        dtype: as in ``base_spec``.
        quantized: as in ``base_spec``.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one; codes stay where they were made.

    Raises:
        ValueError: it cannot be loaded, with the reason.
    """
    import torch

    from ptl.models.adapters import load_adapter
    from ptl.models.build import load_base
    from ptl.models.names import base_spec

    spec = base_spec(found, dtype=dtype, quantized=quantized)
    model: Any = load_base(spec)
    if found.adapter:
        model = load_adapter(model, Path(found.name))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return (model if spec.quantize else model.to(device)).eval()
