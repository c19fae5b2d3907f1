"""What ranks tell each other while answers are sampled: that one of them failed, their sums, what each of them has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

T = TypeVar("T")


def agreed(strategy: Strategy, work: Callable[[], T], did: str = "sampled answers") -> T:
    """Does work that may fail on one rank, such that then all ranks stop, and none waits for it without end.

    Args:
        strategy: the trainer's.
        work: what this rank does.
        did: what it is, for the other ranks' error.

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
        raise RuntimeError(f"another rank failed while it {did}; its own message says why")
    return out


def added(strategy: Strategy, values: Tensor, how: str = "sum") -> Tensor:
    """Values of all ranks added up, or with ``max`` the largest, on the CPU."""
    return strategy.reduce(values.clone().to(strategy.root_device), reduce_op=how).cpu()  # pyright: ignore


def of_all_ranks(own: T) -> list[T]:
    """What each rank has, in the order of the ranks; anything that can be pickled. All ranks call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every
