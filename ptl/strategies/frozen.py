"""A frozen model cut over the ranks by ZeRO-3, beside whatever strategy trains another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ptl.strategies.extensions import load_extension
from ptl.strategies.partition import whole_model
from ptl.strategies.zero_config import for_loading

_STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}


class ShardedModel:
    """A frozen model whose parameters are gathered layer by layer while it runs and released after.

    It has a DeepSpeed engine of its own, without an optimizer, so it does not matter how the student is trained. The
    engine belongs to no ``nn.Module``: nothing of it is in a state dict or a checkpoint.

    Arguments:
        build: makes the model; inside, transformers cuts the weights while it reads them, so no rank holds all of it.

    Raises:
        ValueError: no process group: a single process has nobody to share with.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        if not torch.distributed.is_initialized():
            raise ValueError(
                "teacher.placement sharded needs several ranks: set trainer.devices above 1 with a strategy (ddp or "
                "ZeRO), or teacher.placement replica"
            )
        import deepspeed

        if not torch.cuda.is_available():
            from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

            load_extension(ShareMemCommBuilder())  # before DeepSpeed does
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False)
        with announced():
            model = build()
        dtype = next(model.parameters()).dtype
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": dict(_STAGE_3),
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }
        self._engine, *_ = deepspeed.initialize(
            config=config,
            # DeepSpeed's hook on the module that it is given begins a step, with collectives. That is a module around
            # the model, which never runs, so that the model may run on one rank alone while it is whole.
            model=nn.Sequential(model),
            model_parameters=[],  # pyright: ignore[reportArgumentType]
            dist_init_required=False,
        )
        self.model: nn.Module = model.eval()

    def begin(self) -> None:
        """To be called before each pass, by all ranks: layers are fetched ahead in the order of the first pass.

        DeepSpeed would do so when the module that it was given runs. Without it the order that it keeps grows by every
        layer of every pass, and each layer is fetched when it is needed.
        """
        partitions: Any = self._engine.optimizer
        partitions.get_param_coordinator().reset_step()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The model is whole on every rank inside, where each may run it any number of times, also never.

        All ranks enter and leave together; each needs the memory (``ptl.strategies.partition.has_room_for_whole``).
        """
        with whole_model(self._engine):
            yield

    def close(self) -> None:
        """Takes the engine's hooks off the model."""
        self._engine.destroy()


@contextmanager
def announced() -> Iterator[None]:
    """Inside, transformers shards what it loads; under a ZeRO-3 strategy it does so already."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if is_deepspeed_zero3_enabled():
        yield
        return
    config = for_loading({"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(_STAGE_3)})
    kept_alive = HfDeepSpeedConfig(config)  # transformers knows it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept_alive
