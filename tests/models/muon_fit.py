"""What the process of Muon's test runs: whole runs through the command line."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any


def run(folder: str) -> dict[str, Any]:
    """Exit codes, errors, and how far the weights of a resumed run are from those of one that was not stopped."""
    os.environ["PTL_CACHE"] = f"{folder}/cache"
    from safetensors.torch import load_file

    codes, errors = {}, {}
    for name, run_dir, steps, more in (
        ("whole", "whole", 4, []),
        ("first", "resumed", 2, []),
        ("second", "resumed", 4, ["--run.resume", "auto"]),
        *((f"zero{stage}", f"zero{stage}", 2, zero(stage)) for stage in (1, 2, 3)),
    ):
        codes[name], errors[name] = fit(folder, run_dir, steps, more)
    exports = [load_file(f"{folder}/{at}/model.safetensors") for at in ("whole/export", "resumed/export", "model")]
    whole, resumed, start = exports
    return {
        "codes": codes,
        "errors": errors,
        "largest_difference": max((whole[key] - resumed[key]).abs().max().item() for key in whole),
        "moved": max((whole[key] - start[key]).abs().max().item() for key in whole),
    }


def zero(stage: int) -> list[str]:
    return ["--trainer.strategy", "ptl.strategies.deepspeed.ZeROStrategy", "--trainer.strategy.stage", str(stage)]


def fit(folder: str, run_dir: str, steps: int, more: list[str]) -> tuple[int, str]:
    from ptl import cli

    recipe = Path(__file__).resolve().parents[2] / "configs/recipes/sft_full.yaml"
    arguments = [
        "fit", "-c", str(recipe), "--run.dir", f"{folder}/{run_dir}",
        "--model.policy.name", f"{folder}/model", "--model.optimizer.kind", "muon", "--model.optimizer.lr", "0.01",
        "--model.schedule", "{kind: constant, warmup: 0}",
        "--data.train", f"[{{path: {folder}/rows.jsonl}}]", "--data.pack_to", "256", "--data.max_length", "256",
        "--data.preparation.num_proc", "1", "--data.val_fraction", "0",
        "--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1",
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true",
        "--trainer.accumulate_grad_batches", "1", "--trainer.enable_progress_bar", "false", *more,
    ]  # fmt: skip
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(arguments)
    return code, said.getvalue()[-2000:]
