"""What is measured: a cell of the grid, and the configuration that `ptl fit` runs it with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
OBJECTIVES = {
    "sft": "ptl.objectives.sft.SFT",
    "distillation": "ptl.objectives.distillation.Distillation",
    "reward": "ptl.objectives.reward.RewardModeling",
    "dpo": "ptl.objectives.dpo.DPO",
}
CONFIG = "config"
"""The objective that the given layers name."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        strategy: of ``STRATEGIES``.
        ranks: on each of ``nodes``.
        sequence: tokens of a packed row.
        micro_batch: rows of a micro-batch on a rank.
        accumulate: micro-batches of an optimizer step.
        adapter: ``full``, ``lora:R`` or ``qlora:R``.
        objective: of ``OBJECTIVES``, or ``config``.
        data: ``synthetic``, or the name of the file of rows.
        precision: of the trainer.
    """

    strategy: str = "single"
    ranks: int = 1
    nodes: int = 1
    sequence: int = 512
    micro_batch: int = 1
    accumulate: int = 1
    adapter: str = "full"
    objective: str = "sft"
    data: str = "synthetic"
    precision: str = "32-true"

    @property
    def variant(self) -> str:
        """Adapter and dtype, as results name them."""
        return f"{self.adapter.split(':')[0]}-{'fp32' if self.precision == '32-true' else self.precision}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two measurements comparable but for the strategy."""
        shared = (self.ranks, self.nodes, self.sequence, self.micro_batch, self.accumulate)
        return (*shared, self.adapter, self.objective, self.data, self.precision)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells of a grid share.

    Attributes:
        layers: YAML files below the cell's own layer.
        model: folder or hub name of the policy; None takes the layers'.
        rows: files of rows by objective; empty takes the layers' data.
        row_format: of text rows; None for the layers' own.
        accelerator: ``cpu`` or ``gpu``.
        steps: optimizer steps, ``warmup`` included.
        warmup: steps that are not measured.
    """

    layers: tuple[str, ...] = ()
    model: str | None = None
    rows: dict[str, str] | None = None
    row_format: str | None = None
    accelerator: str = "cpu"
    steps: int = 40
    warmup: int = 10


def grid(**axes: Sequence[Any]) -> list[Cell]:
    """Every combination; ``single`` is one rank on one node, and is kept once."""
    cells = [Cell(**dict(zip(axes, values))) for values in itertools.product(*axes.values())]
    fitting = [cell for cell in cells if (cell.strategy != "single" or cell.ranks * cell.nodes == 1)]
    return list(dict.fromkeys(fitting))


def strategy_config(strategy: str) -> Any:
    """``trainer.strategy`` of a name.

    Raises:
        ValueError: the name is none of ``STRATEGIES``.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if strategy in ("single", "ddp"):
        return {"single": "auto", "ddp": "ddp"}[strategy]  # said, since a layer below may name another
    stage, _, offload = strategy.removeprefix("zero").partition("-")
    arguments: dict[str, Any] = {"stage": int(stage)}
    if offload:
        arguments |= {"offload_optimizer": True, "offload_parameters": stage == "3"}
    return {"class_path": "ptl.strategies.deepspeed.ZeROStrategy", "init_args": arguments}


def policy_config(cell: Cell, setting: Setting) -> dict[str, Any]:
    """``policy`` of a cell.

    Raises:
        ValueError: the adapter is not of the form ``full``, ``lora:R`` or ``qlora:R``.
    """
    policy: dict[str, Any] = {} if setting.model is None else {"name": setting.model}
    kind, _, rank = cell.adapter.partition(":")
    if kind not in ("full", "lora", "qlora") or (kind != "full") != rank.isdigit():
        raise ValueError(f"adapter must be full, lora:R or qlora:R with a rank R, got {cell.adapter!r}")
    if kind != "full":
        policy["adapter"] = {"rank": int(rank), "alpha": 2 * int(rank)}
    if kind == "qlora":
        policy["quantize"] = "nf4"
    return policy


def config_of(cell: Cell, setting: Setting, folder: Path) -> dict[str, Any]:
    """The cell's own layer, which lies on top of the setting's: nothing is saved, exported or validated."""
    trainer: dict[str, Any] = {
        "accelerator": setting.accelerator,
        "devices": cell.ranks,
        "strategy": strategy_config(cell.strategy),
        "num_nodes": cell.nodes,
        "precision": cell.precision,
        "max_steps": setting.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": cell.accumulate,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": max(1, (setting.steps - setting.warmup) // 3),
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    arguments: dict[str, Any] = {"policy": policy_config(cell, setting)}
    if cell.objective == "distillation" and setting.model is not None:
        arguments["teacher"] = {"model": {"name": setting.model}}
    named = {} if cell.objective == CONFIG else {"class_path": OBJECTIVES[cell.objective]}
    data: dict[str, Any] = {"micro_batch_size": cell.micro_batch, "preparation": {"num_proc": 1}}
    if setting.rows is not None:
        source = {"path": setting.rows[cell.objective]}
        text = setting.row_format if cell.objective in ("sft", "distillation") else None
        data |= {"train": [source | ({"format": text} if text else {})], "max_length": cell.sequence}
        data |= {"pack_to": cell.sequence, "truncation": "keep_start" if text else "drop"}
        data["preparation"] |= {"deduplicate": False, "cache_dir": str(folder / "cache")}
    return {
        "seed_everything": 0,
        "model": {**named, "init_args": arguments},
        "data": data,
        "throughput": {"warmup": setting.warmup},
        "checkpoint": {"save_top_k": 0},
        "export": {"merged": False, "adapter": False},
        "run": {"dir": str(folder / "run")},
        "trainer": trainer,
    }
