"""What the process of the recipe test runs: every recipe, two steps, on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml


def run(folder: str, recipes: list[str]) -> dict[str, Any]:
    """Exit code, steps and exported files of each recipe."""
    os.environ["PTL_CACHE"] = f"{folder}/cache"
    from ptl import cli

    results: dict[str, Any] = {}
    for recipe in recipes:
        name = Path(recipe).stem
        kind = name.removeprefix("story_")
        ranked, sampled = kind.startswith(("reward", "dpo")), kind.startswith(("grpo", "ppo", "r1"))
        file = "text" if kind in ("cpt", "pretrain") else "rankings" if ranked else "prompts" if sampled else "rows"
        rows = f"{{path: {folder}/{file}.jsonl}}"
        arguments = [
            "fit", "-c", recipe, "--run.dir", f"{folder}/runs/{name}",
            "--model.policy.name", f"{folder}/model", "--data.train", f"[{rows}]",
            "--data.pack_to", "null" if sampled else "512" if ranked else "256",
            "--data.max_length", "256", "--data.preparation.num_proc", "1", "--data.val_fraction", "0.2",
            "--data.val", "null",
            "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.max_steps", "2",
            "--trainer.accumulate_grad_batches", "1", "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        if sampled:
            arguments += ["--model.rollout.max_new_tokens", "8", "--model.rollout.minibatches", "1"]
            arguments += ["--model.self_check.min_finished", "0", "--data.micro_batch_size", "4"]
            arguments += ["--trainer.val_check_interval", "null"]
        if kind == "pretrain":
            arguments += ["--trainer.val_check_interval", "null", "--trainer.check_val_every_n_epoch", "1"]
            arguments += ["--model.policy.name", f"{folder}/tokenizer", "--data.micro_batch_size", "1"]
        if kind in ("sft", "idk", "tools", "tutorial") and name != "idk":  # the tiny model has not been given the tags
            arguments += ["--model.policy.adapter.train_tokens", "['<|im_end|>']"]
        if name == "long_context":  # one process shares with nobody
            arguments += ["--model.sequence_parallel", "1"]
        if name == "r1_zero":  # its template has a long preface
            arguments += ["--data.max_length", "512"]
        if name.startswith("distill_demo") or kind == "student":
            arguments += ["--model.policy.shrink.layers", "1"]
        if name in ("distill_demo", "distill_zero3") or kind == "student":
            arguments += ["--model.teacher.model.name", f"{folder}/model"]
        if name == "distill_demo" or kind == "student":
            report = {"general": [{"path": f"{folder}/rows.jsonl"}], "max_rows": 4, "speed_tokens": 4}
            callback = {"class_path": "ptl.callbacks.distill_report.DistillReport", "init_args": report}
            arguments += ["--trainer.callbacks", json.dumps([callback])]
        if name.startswith("ppo"):
            [reward] = yaml.safe_load(Path(recipe).read_text())["model"]["init_args"]["rewards"]
            reward["init_args"]["model"] = f"{folder}/scored"
            arguments += ["--model.rewards", json.dumps([reward]), "--model.critic.name", f"{folder}/scored"]
            arguments += ["--model.warm_up", "1"]  # so that the second step trains the policy
        code = cli.main(arguments)
        export = Path(folder) / "runs" / name / "export"
        results[name] = {"code": code, "files": sorted(p.name for p in export.glob("*")) if export.exists() else []}
    return results
