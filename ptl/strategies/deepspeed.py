"""Training under DeepSpeed's ZeRO: Lightning's strategy with its defects met, on CUDA (nccl) and on CPU (gloo).

``trainer.strategy: {class_path: ptl.strategies.deepspeed.ZeROStrategy, init_args: {stage: 2}}`` beside
``trainer.precision: 32-true | bf16-true | bf16-mixed`` is all that a config needs. What this module does differently
from the stock strategy, and why, is written at each method.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from ptl.strategies.extensions import load_extension
from ptl.strategies.limits import check_limits
from ptl.strategies.partition import (
    consolidated_state_dict,
    full_shape,
    gathered,
    gathered_forward,
    share_parameters,
)
from ptl.strategies.precision import ZeROPrecision
from ptl.strategies.zero_config import RunFacts, ZeROOptions, for_loading, merge, resolve_model, resolve_run
from ptl.strategies.zero_steps import SteppedZeRO

__all__ = [
    "ZeROPrecision",
    "ZeROStrategy",
    "adamw_class",
    "consolidated_state_dict",
    "full_shape",
    "gathered",
    "gathered_forward",
    "share_parameters",
]


class ZeROStrategy(SteppedZeRO):
    """Data parallelism with optimizer states (1), gradients (2) and parameters (3) cut over the ranks.

    Optimizer and schedule come from the module's ``configure_optimizers``; only automatic optimisation is supported.
    Checkpoints are folders, whole or absent, without the frozen parameters; resuming on another number of ranks
    converts them first. An optimizer step ends where it ends under DDP, also at the last, shorter window of an epoch.

    Arguments:
        stage: 0 to 3; None takes the config's, or 2.
        offload_optimizer: keep optimizer states in host memory and step there (stage 1 or more).
        offload_parameters: keep parameters in host memory (stage 3).
        hpz_partition_size: ZeRO++: ranks, usually those of a node, that hold a whole second copy of the shards
            (stage 3); 1 for none.
        quantized_weights: ZeRO++: gather weights in int8 (stage 3, CUDA).
        quantized_gradients: ZeRO++: reduce gradients in int4 (stage 3, CUDA).
        config: DeepSpeed config, a mapping or the path of a JSON file, for what the arguments above do not say. Values
            of ``"auto"`` are taken from the trainer and the model. Unknown keys are refused.
        trust_checkpoint: also resume from a checkpoint outside the run's folders; its files are pickles, which can run
            any code.
        max_skipped_steps: consecutive optimizer steps that DeepSpeed may skip because of an overflow in bf16 or fp16
            before the run is stopped.
        timeout_minutes: how long a rank waits for the others in a collective.
        process_group_backend: None for nccl on CUDA and gloo on CPU.

    Raises:
        ValueError: a config that is unknown, unsupported, or contradicts an argument.
    """

    def __init__(
        self,
        *,
        stage: Literal[0, 1, 2, 3] | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        hpz_partition_size: int = 1,
        quantized_weights: bool = False,
        quantized_gradients: bool = False,
        config: dict[str, Any] | str | None = None,
        trust_checkpoint: bool = False,
        max_skipped_steps: int = 20,
        timeout_minutes: float = 30.0,
        process_group_backend: str | None = None,
    ) -> None:
        options = ZeROOptions(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            hpz_partition_size=hpz_partition_size,
            quantized_weights=quantized_weights,
            quantized_gradients=quantized_gradients,
        )
        self._declared = merge(config, options)
        super().__init__(
            config=self._declared,
            timeout=timedelta(minutes=timeout_minutes),
            process_group_backend=process_group_backend,
            exclude_frozen_parameters=True,
        )
        self.trust_checkpoint = trust_checkpoint
        self.max_skipped_steps = max_skipped_steps
        self.has_hooks = False
        """Whether the engine's hooks are on the module: from ``setup`` to ``teardown``."""
        self._hf_config: Any = None

    # ---- what Lightning sets on a strategy ----

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Takes the trainer's precision and puts ours in its place.

        Lightning makes the stock plugin for every DeepSpeed strategy and hands it over here.
        """
        if plugin is not None and not isinstance(plugin, ZeROPrecision):
            if not isinstance(plugin, DeepSpeedPrecision):
                raise ValueError(
                    f"ZeROStrategy takes trainer.precision, not a plugin of its own: got {type(plugin).__name__}"
                )
            plugin = ZeROPrecision(plugin.precision)  # pyright: ignore[reportArgumentType]
        Strategy.precision_plugin.fset(self, plugin)  # pyright: ignore[reportOptionalCall]

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        return super().parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        """Numbers CPU devices, because the stock strategy and DeepSpeed ask each device for its index."""
        if devices is not None:
            devices = [torch.device("cpu", i) if d.type == "cpu" else d for i, d in enumerate(devices)]
        DeepSpeedStrategy.parallel_devices.fset(self, devices)  # pyright: ignore[reportOptionalCall]

    # ---- life of the engine ----

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states are kept, and stepped, in host memory."""
        return "offload_optimizer" in self._settings["zero_optimization"]

    def setup_environment(self) -> None:
        """Refuses what cannot work before anything is loaded, and completes the config from the trainer.

        The check of the stock strategy that the accelerator is CUDA (Lightning pull request #12699) is stepped over on
        the CPU, where DeepSpeed runs over gloo.
        """
        trainer, precision = self._trainer, str(self.precision_plugin.precision)
        zero = self._settings["zero_optimization"]
        check_limits(self._module, device=self.root_device.type, precision=precision, zero=zero)
        if self.config is self._declared:
            facts = RunFacts(
                precision=precision,
                gradient_clip_val=trainer.gradient_clip_val,
                accumulate_grad_batches=trainer.accumulate_grad_batches,
                world_size=self.world_size,
            )
            self.config = resolve_run(self._declared, facts)
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:
            from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

            load_extension(ShareMemCommBuilder())  # before DeepSpeed does, when it joins the ranks
            super(DeepSpeedStrategy, self).setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lets transformers shard what it loads under stage 3, and nothing else.

        The stock context is ``deepspeed.zero.Init`` over all of ``configure_model``: it cuts every new parameter before
        the code that made it has filled it, so LoRA's B starts from noise and resized embeddings crash. Here only
        ``from_pretrained`` shards; what is added afterwards is made whole and cut by the engine. transformers reads the
        setting from a global; it is taken back at teardown.
        """
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        if self.stage == 3:
            self._hf_config = HfDeepSpeedConfig(for_loading(self._settings))
        yield

    def setup(self, trainer: L.Trainer) -> None:
        self.config = resolve_model(self._settings, _hidden_size(self._module))
        super().setup(trainer)

    def init_deepspeed(self) -> None:
        """Makes the engine: for training as the stock strategy does, for evaluation without touching others' hooks.

        The stock strategy first removes every hook of every submodule before evaluating, those of PEFT and transformers
        included (Lightning issue #15247), because the hooks of an earlier engine would be among them; those go at
        teardown here.
        """
        self.has_hooks = True
        if self._trainer.training:
            super().init_deepspeed()
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)
            return
        import deepspeed

        keys = ("train_micro_batch_size_per_gpu", "bf16", "fp16", "data_types", "torch_autocast")
        config = {key: self._settings[key] for key in keys if key in self._settings}
        if self.stage == 3:
            zero = {k: v for k, v in self._settings["zero_optimization"].items() if k != "offload_optimizer"}
            config["zero_optimization"] = zero
        self.model, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index),
            config=config,
            model=self._module,
            model_parameters=[],  # pyright: ignore[reportArgumentType]
            dist_init_required=False,
        )

    def teardown(self) -> None:
        super().teardown()
        if self.engine is not None and self.has_hooks:
            self.engine.destroy()  # takes its hooks off the module; it can still write a checkpoint
            self.has_hooks = False
        if self._hf_config is not None:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()
            self._hf_config = None


def adamw_class(strategy: Strategy) -> type[Optimizer]:
    """The AdamW to make in ``configure_optimizers``: DeepSpeed's vectorised one where the step runs in host memory.

    torch's works with an offloaded optimizer too, several times slower. Both take ``lr``, ``betas``, ``eps`` and
    ``weight_decay``; DeepSpeed's is compiled at first use and needs a C++ compiler and ninja.
    """
    if isinstance(strategy, ZeROStrategy) and strategy.offloads_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.op_builder import CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue]

        load_extension(CPUAdamBuilder())
        return DeepSpeedCPUAdam
    return torch.optim.AdamW


def _hidden_size(module: nn.Module) -> int | None:
    """Width of the widest Hugging Face model inside, where there is one."""
    widths = []
    for child in module.modules():
        text = getattr(getattr(child, "config", None), "get_text_config", None)
        if callable(text) and hasattr(text(), "hidden_size"):
            widths.append(text().hidden_size)  # pyright: ignore
    return max(widths, default=None)
