"""Layers whose element-wise work runs in few kernels: each block of a model compiled by itself.

Norms, rotations, gates and additions of a block move many times the bytes that they need when each runs in a kernel of
its own; ``torch.compile`` joins them. A block and not the model is compiled, so that one compilation, of seconds,
serves all of them. Sizes are symbols, so that packs of other lengths are no reason to compile again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled


def compile_layers(backbone: nn.Module) -> None:
    """Compiles every block of a backbone in place, at its next call; names and weights stay as they are.

    Raises:
        ValueError: the backbone has no list of blocks, or ZeRO-3 shards the weights, whose fetching cannot be compiled.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "policy.compile does not go with ZeRO-3, which fetches each weight when its module is called: set "
            "policy.compile to false, or trainer.strategy.init_args.stage to 2"
        )
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"policy.compile needs a backbone with a list of blocks, and {type(backbone).__name__} has none: set "
            "policy.compile to false"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def is_compiled(model: nn.Module) -> bool:
    """Whether something in the model is compiled."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def not_compiled(model: nn.Module) -> Iterator[None]:
    """Inside, compiled blocks run as they were written: a cache that grows would be compiled again and again."""
    with torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext():
        yield
