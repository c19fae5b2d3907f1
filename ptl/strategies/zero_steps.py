"""Optimizer steps under ZeRO: where a window ends, what its gradient measured, and which steps were skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptl.strategies.zero_checkpoints import CheckpointedZeRO


class SteppedZeRO(CheckpointedZeRO):
    """The part of ``ZeROStrategy`` that steps."""

    max_skipped_steps: int = 20
    _stage0_norm: Tensor | None = None
    _skips_in_a_row: int = 0

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning decides where a window ends, and ``block_backward_sync`` tells DeepSpeed.

        Stock, DeepSpeed counts micro-batches on its own and drifts from the trainer once an epoch does not hold a whole
        number of windows.
        """
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning enters this around every micro-batch but the last of a window."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Steps, and stops a run of which DeepSpeed silently skips step after step.

        Raises:
            RuntimeError: ``max_skipped_steps`` steps in a row had gradients that are not finite.
        """
        skipped = self.skipped_steps()
        output = super().optimizer_step(optimizer, self._measured(closure), model, **kwargs)
        self._skips_in_a_row = self._skips_in_a_row + 1 if self.skipped_steps() > skipped else 0
        if self._skips_in_a_row >= self.max_skipped_steps:
            raise RuntimeError(
                f"{self._skips_in_a_row} optimizer steps in a row were skipped because gradients were not finite: "
                "lower the learning rate, or look for the batch (trainer.strategy.init_args.max_skipped_steps is the "
                "limit)"
            )
        return output

    def grad_norm(self) -> Tensor | None:
        """Norm of the last optimizer step's gradient over all ranks, before clipping: float32 []; None before a step.

        Parameters have no ``.grad`` under ZeRO, so Lightning's own norm utilities see nothing.
        """
        norm = self.engine.get_global_grad_norm() if self.engine is not None else None
        norm = self._stage0_norm if norm is None else norm
        return None if norm is None else torch.as_tensor(norm, dtype=torch.float32)

    def skipped_steps(self) -> int:
        """Optimizer steps of the whole run, resumed parts included, that were skipped because of an overflow.

        The trainer counts a skipped step as done, and the schedule moves on.
        """
        return int(self.engine.skipped_steps) if self.engine is not None else 0

    def judges_steps(self) -> bool:
        """Whether the engine leaves out a step whose gradients are not finite: always but for stage 0 in fp32."""
        return self.engine is not None and hasattr(self.engine.optimizer, "overflow")

    def inner_optimizer(self) -> Optimizer:
        """The optimizer that the engine calls, once or more a step, with a part of the parameters each time.

        Each time the gradients of that part are complete and clipped, and its weights are as they were: torch's own
        ``register_step_pre_hook`` comes before any change.

        Raises:
            ValueError: a setting by which the engine also changes weights without it, or takes no norm before.
        """
        assert self.engine is not None
        zero = self._settings["zero_optimization"]
        offload = zero.get("offload_optimizer") or {}
        scaled = getattr(self.engine.optimizer, "torch_autocast_gradscaler", None) is not None
        for key, got, expected in (
            ("zero_optimization.compute_grad_norm", zero.get("compute_grad_norm", True), True),
            ("zero_optimization.offload_optimizer.super_offload", offload.get("super_offload", False), False),
            ("zero_optimization.offload_optimizer.ratio", float(offload.get("ratio", 1.0)), 1.0),
            ("torch_autocast.dtype", "float16" if scaled else "bfloat16", "bfloat16"),
        ):
            if got != expected:
                raise ValueError(
                    f"strategy config: no step can be judged before it is taken with {key} {got}: set it to "
                    f"{expected}, or remove health.spike"
                )
        optimizer: Any = self.engine.basic_optimizer
        return optimizer

    def step_norm(self) -> Tensor:
        """Norm of the step's gradient over all ranks, before clipping, float32 []; while ``inner_optimizer`` steps.

        DeepSpeed's own door, ``get_global_grad_norm``, still says the norm of the step before; it takes it, once this
        step is done, from where it is read here.
        """
        assert self.engine is not None
        optimizer: Any = self.engine.optimizer
        norm = optimizer._global_grad_norm
        return torch.as_tensor(norm, dtype=torch.float32, device=self.root_device)

    def _measured(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Takes the norm between backward and step at stage 0, where the engine takes none in fp32."""
        if self.stage > 0:
            return closure

        def run() -> Any:
            result = closure()
            grads = [p.grad for p in self._module.parameters() if p.grad is not None]
            self._stage0_norm = torch.nn.utils.get_total_norm(grads)
            return result

        return run
