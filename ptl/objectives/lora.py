"""LoRA and QLoRA fine-tuning by name: SFT with an adapter and its vetted defaults."""

from __future__ import annotations

from dataclasses import replace

from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.sft import SFT


class LoRASFT(SFT):
    """Supervised fine-tuning of low-rank adapters (LoRA, arXiv:2106.09685); QLoRA with ``policy.quantize: nf4``.

    It is ``SFT`` with ``policy.adapter`` made sure of, and a learning rate that suits adapters (ten times full
    fine-tuning's; "LoRA Without Regret", Thinking Machines, 2025). It adds no second mechanism: with the same spec,
    optimizer and schedule, ``SFT`` makes the same losses.

    Arguments:
        policy: the model; ``adapter`` defaults to ``LoRA()``, rank 16 on every linear layer but the head.
        optimizer: defaults to AdamW at 2e-4 without weight decay.
        schedule: as in ``SFT``.
        label_smoothing: as in ``SFT``.
        z_loss: as in ``SFT``.
        neftune_alpha: as in ``SFT``.
        sequence_parallel: as in ``SFT``.
    """

    def __init__(
        self,
        policy: ModelSpec,
        *,
        optimizer: Optimizer | None = None,
        schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        neftune_alpha: float | None = None,
        sequence_parallel: int = 1,
    ) -> None:
        super().__init__(
            policy if policy.adapter is not None else replace(policy, adapter=LoRA()),
            optimizer=optimizer or Optimizer(lr=2e-4),
            schedule=schedule,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            neftune_alpha=neftune_alpha,
            sequence_parallel=sequence_parallel,
        )
