"""Losses and tokens of a run, gathered by micro-batch and summed by optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.machine import StepClock, matmul_rate, peak_memory
from ptl.callbacks.shape import model_shape
from ptl.functional.flops import ModelShape, Work, forward_flops, training_flops


class Counts:
    """Counts of micro-batches, kept on their device until the run is over: nothing here waits for a GPU.

    Arguments:
        accumulate: micro-batches of an optimizer step.
    """

    def __init__(self, accumulate: int) -> None:
        self.accumulate = accumulate
        self.losses: list[Tensor] = []
        self._tokens: list[tuple[Tensor, Tensor, Tensor, int]] = []

    def add(self, lengths: Tensor, trained: Tensor, computed: int) -> None:
        """Lengths of the micro-batch's rows, its trained tokens, and the tokens that go through the model."""
        self._tokens.append((lengths.sum(), trained, lengths.square().sum(), computed))

    def add_loss(self, loss: Tensor) -> None:
        """The micro-batch's share of the step's loss: the shares of a step add up to it."""
        self.losses.append(loss.detach())

    def measured(
        self,
        clock: StepClock,
        policy: nn.Module,
        *,
        start_bytes: int,
        settings: dict[str, Any],
        teacher: str | None = None,
    ) -> Measured:
        """The whole run, to be called right after its last step: the peak of memory is read here.

        Arguments:
            clock: was marked at each step.
            policy: the model, for the operations that a step needs.
            teacher: folder of a frozen model that the same tokens go forward through.
            start_bytes: peak before the model was loaded.
            settings: as in ``Measured``.
        """
        peak = peak_memory(clock.device)
        columns = ([float(row[column]) for row in self._tokens] for column in range(4))
        useful, trained, squares, computed = ([int(n) for n in self._by_step(column)] for column in columns)
        shape = model_shape(policy)
        work = [Work(tokens=t, head_tokens=n, pairs=s) for t, n, s in zip(useful, trained, squares)]
        flops = [training_flops(shape, step) for step in work]
        if teacher is not None:
            frozen = folder_shape(teacher)
            flops = [ours + forward_flops(frozen, step) for ours, step in zip(flops, work)]
        rates = {"fp32": torch.float32, "bf16": torch.bfloat16}
        return Measured(
            seconds=clock.seconds,
            cpu_seconds=clock.cpu_seconds,
            losses=self._by_step([float(loss) for loss in self.losses]),
            useful_tokens=useful,
            trained_tokens=trained,
            computed_tokens=computed,
            flops=flops,
            peak_bytes=peak,
            start_bytes=start_bytes,
            matmul_rates={name: matmul_rate(clock.device, dtype) for name, dtype in rates.items()},
            settings=settings,
        )

    def _by_step(self, values: list[float]) -> list[float]:
        return [sum(values[i : i + self.accumulate]) for i in range(0, len(values), self.accumulate)]


def folder_shape(folder: str) -> ModelShape:
    """The shape of a saved model, from its configuration alone: nothing is loaded."""
    with torch.device("meta"):
        return model_shape(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
