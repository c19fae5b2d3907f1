"""What is different about precision under ZeRO: who divides the loss, what is cast and what is not."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from torch import Tensor, nn

from ptl.strategies.partition import is_partitioned


class ZeROPrecision(DeepSpeedPrecision):
    """Lightning's DeepSpeed precision with three corrections.

    * The engine does not divide the loss by the number of accumulated micro-batches: Lightning has done it. Stock, the
      gradient is too small by that factor, and clipping too loose by it (Lightning issue #6170).
    * Batches are left as they are: stock, every floating tensor of a batch, cached log-probabilities and rewards
      included, is rounded to the training dtype.
    * ``*-true`` casts parameters and not buffers: rotary frequencies and routing biases keep their fp32 values, as
      DeepSpeed itself keeps them.

    ``bf16-true`` and ``bf16-mixed`` give the same engine: bf16 weights and activations, fp32 master weights and moments
    in the optimizer. ``bf16-true`` also makes and casts the model in bf16 before the engine does. For autocast over
    fp32 weights, as DDP's ``bf16-mixed``, use ``32-true`` and ``config: {torch_autocast: {enabled: true, dtype:
    bfloat16}}``.
    """

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the engine computes in."""
        return {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}[self.precision.split("-")[0]]

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Casts the floating parameters under ``*-true``.

        Raises:
            ValueError: a quantised weight is packed in a floating dtype other than the engine's, which would cast, and
                so destroy, the packed bytes.
        """
        for name, parameter in module.named_parameters():
            if not parameter.is_floating_point() or is_partitioned(parameter):
                continue
            if hasattr(parameter, "quant_state") and parameter.dtype != self.dtype:
                raise ValueError(
                    f"{name} packs 4-bit weights in {parameter.dtype}, and the engine casts to {self.dtype}: "
                    "set bnb_4bit_quant_storage to uint8 or to the training dtype"
                )
            if self.precision.endswith("true"):
                parameter.data = parameter.data.to(self.dtype)
        return module

    def backward(
        self, tensor: Tensor, model: L.LightningModule, optimizer: Steppable | None, *args: Any, **kwargs: Any
    ) -> None:
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)
