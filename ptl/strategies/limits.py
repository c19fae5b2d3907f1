"""What ZeRO cannot do, refused in one line before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L


def check_limits(module: L.LightningModule, *, device: str, precision: str, zero: Mapping[str, Any]) -> None:
    """Refuses a run that DeepSpeed would train wrongly, or would fail in far away.

    Arguments:
        module: the module, connected to its trainer.
        device: type of the rank's device, ``cuda`` or ``cpu``.
        precision: Lightning's name.
        zero: the ``zero_optimization`` section.

    Raises:
        ValueError: manual optimisation, clipping by value, another accelerator than DeepSpeed's, or what the CPU lacks.
    """
    if not module.automatic_optimization:
        raise ValueError(
            "ZeROStrategy needs automatic optimisation: with manual backward calls DeepSpeed trains on the last "
            "micro-batch of a step only; return the loss from training_step"
        )
    if str(module.trainer.gradient_clip_algorithm or "norm").lower().endswith("value"):
        raise ValueError(
            "DeepSpeed clips gradients by norm only, got trainer.gradient_clip_algorithm='value': set it to norm, or "
            "use another strategy"
        )
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    found = accelerator.device_name() if accelerator is not None else "nothing"
    if found != device:
        raise ValueError(
            f"the trainer runs on {device} and DeepSpeed on {found}: set the environment variable "
            f"DS_ACCELERATOR={device} before starting"
        )
    if device == "cpu":
        _check_cpu(precision, zero)


def _check_cpu(precision: str, zero: Mapping[str, Any]) -> None:
    if precision.startswith("16"):
        raise ValueError(
            f"DeepSpeed has no fp16 on the CPU, got trainer.precision={precision!r}: use bf16-true or 32-true"
        )
    for name in ("quantized_weights", "quantized_gradients"):
        if zero.get(f"zero_{name}"):
            raise ValueError(f"strategy.{name} needs CUDA: DeepSpeed's quantised communication has no CPU kernel")
