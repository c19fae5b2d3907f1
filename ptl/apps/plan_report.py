"""How ``ptl plan`` shows what it found."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ptl.apps.plan import Option
    from ptl.apps.plan_inputs import Request
    from ptl.functional.plan_rates import Rates
    from ptl.functional.step_time import StepTime

WIDTH = 132
GROUPS = {
    "weights": ("weights", "adapter", "gathered weights", "16-bit copies"),
    "gradients": ("gradients", "embedding's gradient"),
    "optimizer": ("fp32 master weights", "optimizer states"),
    "activations": ("activations",),
    "head": ("head and loss",),
    "frozen": ("frozen models",),
    "buffers": ("buffers of communication",),
    "other": ("libraries", "driver and libraries", "fragments of the allocator"),
}
"""Columns of the memory table and the parts that each sums; ``--json`` has the parts themselves."""


def show(asked: Request, found: Sequence[Option], best: Option | None, grown: Sequence[tuple[int, StepTime]]) -> None:
    """Prints the tables, the choice and what to add to a command."""
    from ptl.apps.plan import config_layers, reason

    console = Console(no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    console.width = max(console.width, WIDTH)  # cells that are cut say nothing; lines that wrap can be widened
    console.print(_headline(asked), markup=False)
    console.print(_memory_table(asked, found, best))
    console.print(_time_table(found, best))
    if grown:
        console.print(_scaling_table(grown))
    console.print(f"rates: {_rates(asked.rates)}", markup=False)
    if asked.job.objective in ("grpo", "ppo"):
        console.print("the time to sample answers is not in these steps, and its cache is not in this memory")
    console.print(reason(found, best), style="bold", markup=False)
    if best is not None:
        words = shlex.join(config_layers(asked, best))
        console.print(f"add: ptl fit -c YOUR_RECIPE.yaml {words}", markup=False, soft_wrap=True)


def _headline(asked: Request) -> str:
    job = asked.job
    adapter = "full" if job.rank is None else f"{'QLoRA' if job.quantize else 'LoRA'} rank {job.rank}"
    devices = f"{job.nodes} x {job.per_node} {asked.rates.name}" if job.nodes > 1 else f"{job.world} {asked.rates.name}"
    beside = f", beside {job.teacher.parameters / 1e9:.2f}B frozen" if job.teacher else ""
    return (
        f"{asked.name}: {job.model.parameters / 1e9:.2f}B parameters, {job.trained() / 1e6:,.1f}M trained ({adapter}, "
        f"{job.objective}, {job.precision}{beside}); {job.micro_batch} x {job.sequence} tokens, {job.accumulate} "
        f"micro-batches a step, on {devices}"
    )


def _memory_table(asked: Request, found: Sequence[Option], best: Option | None) -> Table:
    limit = asked.rates.memory / 2**30
    table = Table(title=f"GiB of a device at its peak, of {limit:.0f} with {asked.margin:.0%} left free")
    used = [name for name, parts in GROUPS.items() if any(o.memory.device.get(p) for o in found for p in parts)]
    table.add_column("strategy", no_wrap=True)
    for name in [*used, "total", "host", "fits", "max rows"]:
        table.add_column(name, justify="right")
    for option in found:
        sums = [sum(option.memory.device.get(part, 0.0) for part in GROUPS[name]) for name in used]
        host = option.memory.host_total if option.memory.host else 0.0
        numbers = [*(_gib(value) for value in sums), _gib(option.memory.device_total), _gib(host)]
        table.add_row(
            _name(option), *numbers, "yes" if option.fits else "no", str(option.largest), style=_style(option, best)
        )
    return table


def _time_table(found: Sequence[Option], best: Option | None) -> Table:
    table = Table(title="seconds of an optimizer step, predicted; tokens/s and GB sent are of one device")
    table.add_column("strategy", no_wrap=True)
    for name in ("products", "attention", "others", "optimizer", "frozen", "network", "exposed", "step"):
        table.add_column(name, justify="right")
    for name in ("tokens/s", "MFU", "GB sent"):
        table.add_column(name, justify="right")
    for option in found:
        t = option.time
        update = t.optimizer + t.offload
        parts = (t.products, t.attention, t.elementwise, update, t.frozen, t.network, t.exposed, t.step)
        rest = (f"{t.tokens_per_second:,.0f}", f"{t.mfu:.0%}", f"{t.sent / 1e9:,.1f}")
        table.add_row(_name(option), *(f"{value:.3g}" for value in parts), *rest, style=_style(option, best))
    return table


def _scaling_table(grown: Sequence[tuple[int, StepTime]]) -> Table:
    table = Table(title="the choice on more nodes, the same batch on each device")
    for name in ("nodes", "step", "tokens/s of a device", "network", "exposed", "efficiency"):
        table.add_column(name, justify="right")
    first = grown[0][1].tokens_per_second
    for nodes, t in grown:
        speed = f"{t.tokens_per_second:,.0f}"
        shares = (f"{t.network:.3g}", f"{t.exposed:.3g}", f"{t.tokens_per_second / first:.0%}")
        table.add_row(str(nodes), f"{t.step:.3g}", speed, *shares)
    return table


def _name(option: Option) -> str:
    return option.strategy.name + (" +ckpt" if option.checkpointing else "")


def _style(option: Option, best: Option | None) -> str:
    return "bold green" if option is best else ("" if option.fits else "dim")


def _gib(value: float) -> str:
    return "" if not value else f"{value / 2**30:.1f}" if value >= 0.1 * 2**30 else f"{value / 2**30:.2f}"


def _rates(rates: Rates) -> str:
    shown: dict[str, Any] = asdict(rates)
    return ", ".join(f"{key} {value:.4g}" for key, value in shown.items() if isinstance(value, int | float))
