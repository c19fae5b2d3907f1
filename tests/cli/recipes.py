"""What the process of the recipe test runs: every recipe, two steps, on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def run(folder: str, recipes: list[str]) -> dict[str, Any]:
    """Exit code, steps and exported files of each recipe."""
    os.environ["PTL_CACHE"] = f"{folder}/cache"
    from ptl import cli

    results: dict[str, Any] = {}
    for recipe in recipes:
        name = Path(recipe).stem
        ranked = name.startswith(("reward", "dpo"))
        rows = f"{{path: {folder}/{'text' if name == 'cpt' else 'rankings' if ranked else 'rows'}.jsonl}}"
        arguments = [
            "fit", "-c", recipe, "--run.dir", f"{folder}/runs/{name}",
            "--model.policy.name", f"{folder}/model", "--data.train", f"[{rows}]",
            "--data.pack_to", "512" if ranked else "256",
            "--data.max_length", "256", "--data.preparation.num_proc", "1", "--data.val_fraction", "0.2",
            "--data.val", "null",
            "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", "2",
            "--trainer.accumulate_grad_batches", "1", "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        if name.startswith("distill_demo"):
            arguments += ["--model.policy.shrink.layers", "1"]
        if name in ("distill_demo", "distill_zero3"):
            arguments += ["--model.teacher.model.name", f"{folder}/model"]
        if name == "distill_demo":
            report = {"general": [{"path": f"{folder}/rows.jsonl"}], "max_rows": 4, "speed_tokens": 4}
            callback = {"class_path": "ptl.callbacks.distill_report.DistillReport", "init_args": report}
            arguments += ["--trainer.callbacks", json.dumps([callback])]
        code = cli.main(arguments)
        export = Path(folder) / "runs" / name / "export"
        results[name] = {"code": code, "files": sorted(p.name for p in export.glob("*")) if export.exists() else []}
    return results
