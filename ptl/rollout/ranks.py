"""What ranks tell each other while answers are sampled: that one of them failed, and their sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

T = TypeVar("T")


def agreed(strategy: Strategy, work: Callable[[], T]) -> T:
    """Does work that may fail on one rank, such that then all ranks stop, and none waits for it without end.

    Raises:
        RuntimeError: another rank failed.
    """
    error: Exception | None = None
    out: Any = None
    try:
        out = work()
    except Exception as raised:
        error = raised
    failed = strategy.reduce(torch.tensor(float(error is not None), device=strategy.root_device), reduce_op="sum")
    if error is not None:
        raise error
    if float(failed) > 0:
        raise RuntimeError("another rank failed while it sampled answers; its own message says why")
    return out


def added(strategy: Strategy, values: Tensor, how: str = "sum") -> Tensor:
    """Values of all ranks added up, or with ``max`` the largest, on the CPU."""
    return strategy.reduce(values.clone().to(strategy.root_device), reduce_op=how).cpu()  # pyright: ignore
