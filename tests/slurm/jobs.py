"""What the jobs of the SLURM tests train: the real command line on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ptl.callbacks.jsonl import METRICS_FILE, read_metrics

STEPS = 12
"""24 rows, four a step, two epochs."""


def arguments(folder: Path, run: Path, *extra: str, stage: int | None = 2, ranks: int = 2, **keys: Any) -> list[str]:
    """Arguments of ``ptl fit`` for a small run."""
    strategy = ["--trainer.strategy", "ptl.strategies.deepspeed.ZeROStrategy", "--trainer.strategy.stage", str(stage)]
    settings = {
        "model": "ptl.objectives.sft.SFT",
        "model.policy.name": f"{folder}/model",
        "model.optimizer.lr": "1e-3",
        "data.train": json.dumps([{"path": f"{folder}/rows.jsonl"}]),
        "data.max_length": 256,
        "data.preparation.cache_dir": f"{folder}/cache",
        "data.preparation.num_proc": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.accumulate_grad_batches": 4 // ranks,
        "trainer.max_epochs": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.num_sanity_val_steps": 0,
        "run.dir": run,
        **keys,
    }
    flat = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [*flat[:2], *(strategy if stage is not None else []), *flat[2:], *extra]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The run's metrics as one that was never interrupted would have written them, without times and speeds."""
    kept = [
        {key: value for key, value in row.items() if key != "time" and not key.startswith("throughput/")}
        for row in read_metrics(run / METRICS_FILE)
    ]
    return [row for row in kept if len(row) > 2]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The exported weights."""
    from safetensors.torch import load_file

    return load_file(run / "export" / "model.safetensors")
