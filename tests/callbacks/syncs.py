"""Counts what makes the host wait for the device, and who asks for it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.health import Health
from ptl.callbacks.preemption import Preemption
from ptl.callbacks.record import RunRecord
from ptl.callbacks.stragglers import Stragglers
from ptl.callbacks.throughput import Throughput
from ptl.callbacks.watchdog import Watchdog
from ptl.data.module import ChatDataModule
from ptl.objectives.base import Objective
from tests.callbacks.parts import trainer
from tests.ranks import ROOT

_READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.cpu,
    torch.Tensor.numpy,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__contains__,
    torch.Tensor.nonzero,
    torch.nonzero,
}
_SCALAR = torch.ops.aten._local_scalar_dense.default
_SHAPED = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default}
"""Calls whose result has a shape that only the device knows."""
_HERE = Path(__file__).name
MICRO_BATCHES = 8
"""Of a rank, in what is counted."""


class Waits:
    """Every place at which a value of a tensor was read on the host, or would be with a tensor of a device's.

    On the CPU such a read costs nothing, but it is the same call. Python's calls are seen by a function mode, those of
    torch's own inside by a dispatch mode.

    Attributes:
        seen: a call of Python's is under way, and counted.
        places: ``(who, file:function)`` -> times; who is ``ptl``, ``tests`` or the name of the package, that of the
            innermost frame outside torch.
    """

    def __init__(self) -> None:
        self.places: Counter[tuple[str, str]] = Counter()
        self.seen = False
        self._function, self._dispatch = _Functions(self), _Dispatches(self)

    def __enter__(self) -> Waits:
        self._function.__enter__()
        self._dispatch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._dispatch.__exit__(*error)
        self._function.__exit__(*error)

    def of(self, who: str) -> dict[str, int]:
        """The places of one owner."""
        return {place: times for (owner, place), times in self.places.items() if owner == who}

    def note(self) -> None:
        self.places[_asker(sys._getframe(2))] += 1


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function not in _READS:
            return function(*arguments, **(keywords or {}))
        self.waits.note()
        self.waits.seen = True
        try:
            return function(*arguments, **(keywords or {}))
        finally:
            self.waits.seen = False


class _Dispatches(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if not self.waits.seen and (function is _SCALAR or _is_shaped(function, arguments, keywords or {})):
            self.waits.note()
        return function(*arguments, **(keywords or {}))


def _is_shaped(function: Any, arguments: Any, keywords: dict[str, Any]) -> bool:
    if function is torch.ops.aten.index.Tensor:
        return any(place is not None and place.dtype == torch.bool for place in arguments[1])
    if function is torch.ops.aten.repeat_interleave.Tensor:
        return keywords.get("output_size") is None
    return function in _SHAPED


def _asker(frame: FrameType | None) -> tuple[str, str]:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        owner = _owner(path)
        if owner != "torch" and path.name != _HERE:
            return owner, f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch", "alone"


def _owner(path: Path) -> str:
    if path.is_relative_to(ROOT / "ptl"):
        return "ptl"
    if path.is_relative_to(ROOT / "tests"):
        return "tests"
    parts = path.parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else "python"


class _Window(Callback):
    """Counts from the end of step 2 to the end of step 6."""

    def __init__(self, waits: Waits) -> None:
        self.waits, self.inside = waits, False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2 and not self.inside:
            self.inside = True
            self.waits.__enter__()
        elif trainer.global_step == 6 and self.inside:
            self.inside = False
            self.waits.__exit__(None, None, None)


def count(
    module: Objective, data: ChatDataModule, run: Path, *, spike: Any = None, ranks: int = 1, preemption: bool = True
) -> dict[str, dict[str, int]]:
    """Waits by owner and place in eight micro-batches, four optimizer steps, of which none is logged."""
    waits = Waits()
    callbacks: list[Any] = [
        Throughput(warmup=1),
        Health(spike=spike),
        Watchdog(),
        Stragglers(),
        RunRecord(run),
        _Window(waits),
        Checkpoint(every_n_train_steps=100),
    ]
    options = {"log_every_n_steps": 10, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "max_steps": 8}
    if ranks > 1:
        options |= {"strategy": "ddp", "devices": ranks}
    data.bind(view=module.view, tokenizer=None)
    fit = trainer(run, [*callbacks, *([Preemption()] if preemption else [])], **options)
    fit.fit(module, data)
    assert fit.global_step == 8 and all(group["fused"] for group in fit.optimizers[0].param_groups)
    return {owner: waits.of(owner) for owner, _ in waits.places}
