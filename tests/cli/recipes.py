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
        ranked, sampled = name.startswith(("reward", "dpo")), name.startswith(("grpo", "ppo", "r1"))
        file = "text" if name in ("cpt", "pretrain") else "rankings" if ranked else "prompts" if sampled else "rows"
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
            rewards = yaml.safe_load(Path(recipe).read_text())["model"]["init_args"]["rewards"]
            for settings in (reward.get("init_args", {}) for reward in rewards):
                settings |= {"processes": 1} if "processes" in settings else {}  # each takes seconds to start
                settings |= {"model": f"{folder}/scored"} if "model" in settings else {}
            arguments += ["--model.rewards", json.dumps(rewards)]
        if name == "pretrain":
            arguments += ["--trainer.val_check_interval", "null", "--trainer.check_val_every_n_epoch", "1"]
            arguments += ["--model.policy.name", f"{folder}/tokenizer", "--data.micro_batch_size", "1"]
        if name in ("tools", "tutorial"):  # the tiny model has not been given the tags
            arguments += ["--model.policy.adapter.train_tokens", "['<|im_end|>']"]
        if name == "long_context":  # one process shares with nobody
            arguments += ["--model.sequence_parallel", "1"]
        if name == "r1_zero":  # its template has a long preface
            arguments += ["--data.max_length", "512"]
        if name.startswith("distill_demo"):
            arguments += ["--model.policy.shrink.layers", "1"]
        if name in ("distill_demo", "distill_zero3"):
            arguments += ["--model.teacher.model.name", f"{folder}/model"]
        if name == "distill_demo":
            report = {"general": [{"path": f"{folder}/rows.jsonl"}], "max_rows": 4, "speed_tokens": 4}
            callback = {"class_path": "ptl.callbacks.distill_report.DistillReport", "init_args": report}
            arguments += ["--trainer.callbacks", json.dumps([callback])]
        if name.startswith("ppo"):  # the second step trains the policy
            arguments += ["--model.critic.name", f"{folder}/scored", "--model.warm_up", "1"]
        code = cli.main(arguments)
        export = Path(folder) / "runs" / name / "export"
        results[name] = {"code": code, "files": sorted(p.name for p in export.glob("*")) if export.exists() else []}
    return results
