"""The learning curve of ``make grpo-demo``, kept and drawn.

``python -m benchmarks.grpo_demo`` reads the run folder that the demo has left, adds held-out pass rate and training
reward by step to ``benchmarks/results/grpo_demo.json``, and draws them to ``docs/images/grpo-demo.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from ptl.callbacks.jsonl import METRICS_FILE, read_metrics

PASS, REWARD, LENGTH = "val/pass@1", "train/reward", "train/length"
IMAGE = Path("docs/images/grpo-demo.png")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.grpo_demo", description=__doc__, allow_abbrev=False)
    top.add_argument("--run", type=Path, default=Path("runs/grpo-demo"), help="run folder")
    top.add_argument("--image", type=Path, default=IMAGE)
    top.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the results")
    return top


def curve(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """``(optimizer steps done, value)`` of a metric; the first validation is the model's before training."""
    found = [(int(row["step"]), float(row[name])) for row in rows if name in row]
    if name.startswith("val/") and found:
        return [(0, found[0][1]), *((step + 1, value) for step, value in found[1:])]
    return [(step + 1, value) for step, value in found]


def draw(held_out: Sequence[tuple[int, float]], reward: Sequence[tuple[int, float]], image: Path) -> None:
    """Both curves over the optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*reward), color="tab:gray", linewidth=1, label="reward of the training answers")
    axes.plot(*zip(*held_out), color="tab:blue", marker="o", label="pass rate on held-out sums")
    axes.set(xlabel="optimizer step", ylim=(0, 1), title="SmolLM2-135M learns one-digit sums by GRPO")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    options = parser().parse_args(argv)
    rows = read_metrics(options.run / METRICS_FILE)
    held_out, reward = curve(rows, PASS), curve(rows, REWARD)
    draw(held_out, reward, options.image)
    seconds = float(rows[-1]["time"]) - float(rows[0]["time"])
    result = {
        "stage": "grpo",
        "variant": "lora-fp32",
        "task": "one-digit chain_sum",
        "pass_rate": held_out,
        "reward": [(step, round(value, 4)) for step, value in reward],
        "length": [(step, round(value, 2)) for step, value in curve(rows, LENGTH)],
        "minutes_after_the_first_validation": round(seconds / 60, 1),
    }
    print(record.append("grpo_demo", result, folder=options.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
