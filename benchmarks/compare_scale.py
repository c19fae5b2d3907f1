"""``ptl compare`` over a thousand runs of ten thousand points each: seconds by part, and bytes read.

    python -m benchmarks.compare_scale [--runs 1000] [--points 10000] [--wandb-runs 6]

Run folders are written as ``ptl fit`` leaves them: a row a step with loss, gradient norm and learning rate, a row of
validation every 500 steps, a resolved configuration of 200 lines that differs in the learning rate and the seed (three
seeds a group). Thirty logs are made and copied, each run has a file of its own. The command then runs as a person runs
it, in a process of its own, and writes everything that ``--out`` writes; ``json_processor_seconds`` is what Python's
own parser takes for the same rows, by the first thirty runs. W&B's files are of fewer runs, since writing them takes
W&B long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record

SEEDS, LOGS = 3, 30


def log_of(number: int, points: int) -> str:
    """The rows of a run."""
    rng = random.Random(number)
    rate, start = 1e-4 * (1 + number // SEEDS), 1.79e9
    lines = ['{"event": "start", "step": 0, "time": 1790000000.0}']
    for step in range(points):
        common = {"step": step, "epoch": step // 1000, "time": round(start + 0.5 * step, 3)}
        loss = 2 * math.exp(-step * rate) + rng.gauss(0, 0.05)
        row = {**common, "train/loss": loss, "health/grad_norm": rng.random(), "lr-AdamW": rate * (1 - step / points)}
        lines.append(json.dumps(row))
        if step % 500 == 499:
            lines.append(json.dumps({**common, "val/loss": 2 * math.exp(-step * rate), "val/accuracy": rng.random()}))
    return "\n".join(lines) + "\n"


def write_run(folder: Path, number: int, points: int, config: str, log: str) -> None:
    """Writes a run folder."""
    folder.mkdir(parents=True)
    rate, seed, start = 1e-4 * (1 + number // SEEDS), number % SEEDS, 1.79e9
    text = config.replace("lr: 0.001", f"lr: {rate:.6f}").replace("seed_everything: 0", f"seed_everything: {seed}")
    (folder / "config.yaml").write_text(text.replace("run:\n  dir: null", f"run:\n  dir: {folder}"))
    (folder / "metrics.jsonl").write_text(log)
    seconds = 0.5 * points
    throughput = {"tokens_per_second_per_device": 1e4 + number, "mfu": 0.4, "peak_memory_gib": 60.0}
    summary = {"status": "finished", "error": None, "global_step": points, "monitor": "val/loss", "devices": 8}
    summary |= {"wall_seconds_all_attempts": seconds, "attempts": 1, "throughput": throughput}
    (folder / "summary.json").write_text(json.dumps(summary))
    events = [{"event": "start", "attempt": 1, "time": start, "world_size": 8}]
    events.append({"event": "end", "attempt": 1, "time": start + seconds, "status": "finished", "step": points})
    (folder / "attempts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def resolved_config() -> str:
    """A resolved configuration, as ``ptl fit`` writes it."""
    from ptl.trainer_cli import PTLCLI

    class ParseOnly(PTLCLI):
        def instantiate_classes(self) -> None:
            pass

        def after_instantiate_classes(self) -> None:
            pass

    root = Path(__file__).parent.parent / "configs/recipes/demo.yaml"
    cli = ParseOnly(["-c", str(root)], run=False)
    return cli.parser.dump(cli.config, skip_none=False)


def write_wandb(folder: Path, runs: int, points: int) -> None:
    """Offline runs of W&B's own library, each with the points of a run folder."""
    import wandb

    for number in range(runs):
        rng = random.Random(number)
        run = wandb.init(
            project="scale",
            dir=folder,
            mode="offline",
            config={"lr": number // SEEDS, "seed": number % SEEDS},
            settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"),
        )
        for step in range(points):
            run.log({"trainer/global_step": step, "train/loss": rng.random(), "health/grad_norm": 1.0, "lr": 1e-4})
        run.finish()


def timed(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one ``ptl`` command."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "ptl.cli", *arguments], check=True, stdout=subprocess.DEVNULL, timeout=600)
    wall, after = time.perf_counter() - began, os.times()
    children = (after.children_user - before.children_user) + (after.children_system - before.children_system)
    return wall, children


def plain_seconds(logs: list[str]) -> float:
    """Processor seconds of ``json.loads`` over each line."""
    began = time.process_time()
    for log in logs:
        for line in log.splitlines():
            json.loads(line)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--wandb-runs", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        config = resolved_config()
        logs = [log_of(i, options.points) for i in range(min(LOGS, options.runs))]
        for i in range(options.runs):
            write_run(top / "runs" / f"run-{i:04}", i, options.points, config, logs[i % LOGS])
        json_seconds = plain_seconds(logs) * options.runs / len(logs)
        wall, processor = timed(["compare", str(top / "runs"), "--out", str(top / "out"), "--price", "2"])
        figures = {
            "runs": options.runs,
            "points_per_run": options.points,
            "log_bytes": sum(len(logs[i % LOGS]) for i in range(options.runs)),
            "seconds": round(wall, 2),
            "processor_seconds": round(processor, 2),
            "json_processor_seconds": round(json_seconds, 2),
            "rows_per_second": round(options.runs * options.points / wall),
            "page_bytes": (top / "out/compare.html").stat().st_size,
            "load_average": round(os.getloadavg()[0], 2),
        }
        if options.wandb_runs:
            write_wandb(top, options.wandb_runs, options.points)
            seconds, _ = timed(["compare", str(top / "wandb")])
            figures |= {"wandb_runs": options.wandb_runs, "wandb_seconds": round(seconds, 2)}
    line = record.append("compare_scale", {"stage": "compare", "variant": "run-folders", **figures})
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main()
