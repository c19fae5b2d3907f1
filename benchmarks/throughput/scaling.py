"""Runs on growing numbers of nodes, submitted to SLURM by ``slurm/train.sbatch``."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.throughput.cells import Cell, Setting, config_of
from benchmarks.throughput.run import outcome, summary_of

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
RUNNING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}


def cells(base: Cell, nodes: Sequence[int], kind: str) -> list[Cell]:
    """One cell a number of nodes.

    Arguments:
        base: what runs on each.
        nodes: numbers of nodes, growing.
        kind: ``weak``, the same batch on each rank; ``strong``, the same batch on all together.

    Raises:
        ValueError: the batch cannot be dealt to so many nodes.
    """
    if kind == "weak":
        return [replace(base, nodes=count) for count in nodes]
    whole = base.accumulate * nodes[0]
    bad = [count for count in nodes if whole % count]
    if bad:
        raise ValueError(
            f"strong scaling deals {whole} micro-batches of a step to the nodes, and {bad[0]} does not divide them: "
            "choose another --accumulate"
        )
    return [replace(base, nodes=count, accumulate=whole // count) for count in nodes]


def submit(cell: Cell, setting: Setting, folder: Path, options: Sequence[str], cluster: str | None) -> int:
    """Submits a cell; the job's number.

    Raises:
        ValueError: sbatch refused, with its words.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.yaml").write_text(yaml.safe_dump(config_of(cell, setting, folder)), encoding="utf-8")
    shape = [f"--nodes={cell.nodes}", f"--ntasks-per-node={cell.ranks}", "--no-requeue", f"--output={folder}/job.out"]
    words = [word for option in [*shape, *options] for word in ("--sbatch", option)]
    profile = ["--cluster", cluster] if cluster else []
    files = [word for file in [*setting.layers, f"{folder}/cell.yaml"] for word in ("-c", file)]
    command = [str(SCRIPT), *profile, *words, *files, "--run.dir", f"{folder}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refused {cell.nodes} nodes: {' '.join((done.stderr or done.stdout).split())}")
    return int(done.stdout.split()[-1].split(";")[0])


def await_job(job: int, timeout: float) -> str:
    """The job's last state; one that is not over in time is cancelled and ``TIMEOUT``."""
    deadline = time.monotonic() + timeout
    while True:
        command = ["scontrol", "show", "job", str(job)]
        text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
        state = next((word.partition("=")[2] for word in text.split() if word.startswith("JobState=")), "GONE")
        if state not in RUNNING:
            return state
        if time.monotonic() > deadline:
            subprocess.run(["scancel", str(job)], timeout=60, check=False)
            return "TIMEOUT"
        time.sleep(1.0)


def result(cell: Cell, folder: Path, state: str) -> dict[str, Any]:
    """What became of a job: as ``run.outcome``."""
    logs = [*sorted(folder.glob("run/slurm/latest/rank*.log")), folder / "job.out"]
    log = "\n".join(path.read_text(errors="replace") for path in logs if path.exists())
    code = None if state == "TIMEOUT" else 0 if state == "COMPLETED" else 1
    return outcome(code, log, summary_of(folder / "run"))


def efficiencies(lines: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Tokens a second over those of the first line times the ratio of ranks; None where a run failed.

    Weak and strong alike: 1 is perfect.
    """
    first = lines[0]
    rate, ranks = first.get("tokens_per_second"), first["ranks"] * first["nodes"]
    out: list[float | None] = []
    for line in lines:
        own = line.get("tokens_per_second")
        perfect = None if rate is None else rate * line["ranks"] * line["nodes"] / ranks
        out.append(None if own is None or not perfect else round(own / perfect, 4))
    return out
