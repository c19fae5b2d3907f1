"""Parameters that ZeRO-3 has cut into shards: reading them whole, using them outside their module, exporting them.

Every function here does nothing special to a parameter that is not partitioned, so callers need not ask which strategy
runs. Under ZeRO-3 each is collective: all ranks call it, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

ROOM = 0.5
"""Memory to generate in, as a share of the weights that are gathered for it."""


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 manages the tensor, so that its data may be a shard of it."""
    return hasattr(tensor, "ds_id")


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole parameter, also where only a shard is here."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def share_parameters(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Declares that ``module``'s forward, or what it calls, reads parameters that other modules own.

    ZeRO-3 gathers a parameter around its owner's forward and backward. One that is read elsewhere, such as the LM
    head's weight in a loss fused with it, is gathered from here on around ``module``'s forward and backward too and
    released after each. The smaller ``module`` is, the shorter the whole matrix is held; the LightningModule itself
    will do. Calling it again with the same parameters changes nothing.

    Arguments:
        module: the module in whose forward the parameters are read; for the LightningModule that is the whole step.
        parameters: what is read there; those that are not partitioned are left alone.
    """
    for parameter in parameters:
        if is_partitioned(parameter):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def gathered(what: nn.Module | Iterable[Tensor]) -> Iterator[None]:
    """Parameters are whole on every rank inside, and shards again after. For reading: a change inside is lost.

    For a forward pass of a model see ``gathered_forward``: the hooks of ZeRO-3 would release what is gathered here.

    Arguments:
        what: a module with all its parameters, or some parameters.
    """
    tensors = what.parameters() if isinstance(what, nn.Module) else what
    away = [tensor for tensor in tensors if is_partitioned(tensor) and not _is_whole(tensor)]
    if not away:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(away):
        yield


@contextmanager
def gathered_forward(strategy: Strategy) -> Iterator[None]:
    """The whole model is on every rank inside, without ZeRO-3's hooks: for generating between training steps.

    Ranks may run different numbers of forward passes inside, also none. The memory of the whole model in the training
    dtype is needed on each device; where it does not fit, generate without this context, on all ranks together and
    with ``synced_gpus=True``.

    Arguments:
        strategy: the trainer's; nothing is done unless it has partitioned the parameters.
    """
    module = strategy.model
    if module is None or not any(is_partitioned(p) for p in module.parameters()):
        yield
        return
    with whole_model(module) if getattr(strategy, "has_hooks", False) else gathered(module):
        yield


@contextmanager
def whole_model(engine: nn.Module) -> Iterator[None]:
    """``gathered_forward`` for a DeepSpeed engine of stage 3.

    Arguments:
        engine: with its hooks. The module that it was given does not run inside, only modules in it do: the hook by
            which DeepSpeed begins a step stays on it, and is collective.
    """
    from deepspeed.runtime.zero import unwrap_model_for_generation

    failure: BaseException | None = None
    with unwrap_model_for_generation(engine):
        try:
            yield
        except BaseException as error:  # DeepSpeed puts its hooks back only when this block ends well
            failure = error
    if failure is not None:
        raise failure


def has_room_for_whole(module: nn.Module, strategy: Strategy) -> bool:
    """Whether every rank has the memory to make the module whole and to generate with it; all ranks hear the same.

    Counted are the parameters that are shards now and ``ROOM`` times as much for keys, values and what is between
    layers. Ranks of one machine that run on its processors share its memory.

    Arguments:
        module: partitioned or not.
        strategy: the trainer's.
    """
    away = [p for p in module.parameters() if is_partitioned(p) and not _is_whole(p)]
    needed = (1 + ROOM) * sum(full_shape(p).numel() * p.element_size() for p in away)
    short = needed > free_bytes(strategy.root_device, getattr(strategy, "num_processes", 1))
    ranks_short = strategy.reduce(torch.tensor(float(short), device=strategy.root_device), reduce_op="sum")
    return float(ranks_short) == 0


def free_bytes(device: torch.device, ranks: int) -> float:
    """Memory that a rank can still take: of its GPU, or its part of what the machine has where ``ranks`` share it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available / ranks


def consolidated_state_dict(module: nn.Module, *, trainable_only: bool = False) -> dict[str, Tensor]:
    """The state dict of whole tensors, for an export.

    Under ZeRO-3 the parameters are gathered one by one and kept in host memory on rank 0; other ranks get an empty
    dict. Otherwise it is the plain state dict, detached, on every rank. Tied parameters are one tensor under each name.

    Arguments:
        module: what is exported, with its own names (``objective.policy``, not the objective).
        trainable_only: only parameters with ``requires_grad``: an adapter without its base, and no buffers.
    """
    state = module.state_dict(keep_vars=True)
    if trainable_only:
        state = {name: tensor for name, tensor in state.items() if tensor.requires_grad}
    if not any(is_partitioned(tensor) for tensor in module.parameters()):
        return {name: tensor.detach() for name, tensor in state.items()}
    keep = torch.distributed.get_rank() == 0
    whole: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) not in copies:
            with gathered([tensor]):
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if keep else tensor.new_empty(0)
        whole[name] = copies[id(tensor)]
    return whole if keep else {}


def _is_whole(parameter: Tensor) -> bool:
    from deepspeed.runtime.zero import ZeroParamStatus

    return getattr(parameter, "ds_status", None) == ZeroParamStatus.AVAILABLE
