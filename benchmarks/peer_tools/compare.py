"""Pairs of measured runs, each in a process of its own, and what they say beside each other."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SHOWN_STEPS = 5
"""Steps whose losses are written out and compared."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of one side. The lists have one entry an optimizer step, warm-up included.

    Attributes:
        seconds: wall time of a step.
        cpu_seconds: of all cores together.
        losses: mean loss over the step's trained tokens.
        useful_tokens: tokens of the step's rows, without padding.
        trained_tokens: tokens that the loss is taken on.
        computed_tokens: tokens that went through the model, padding included.
        flops: what the step needs at least (``ptl.functional.flops``): no padding, the head on trained tokens alone.
        peak_bytes: most memory held at one time, from the start of the process to the last step.
        start_bytes: the same before the model was loaded: interpreter and libraries.
        matmul_rates: FLOP/s of a plain matrix product on this machine right after the run, by dtype.
        settings: what this side was run with, as its own library names it.
        process_seconds: from the start of the process to its end, as seen from outside.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]
    useful_tokens: list[int]
    trained_tokens: list[int]
    computed_tokens: list[int]
    flops: list[float]
    peak_bytes: int
    start_bytes: int
    matmul_rates: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    process_seconds: float = 0.0


@dataclass(frozen=True)
class Pair:
    """One run of each side, one after the other."""

    ptl: Measured
    peer: Measured


def run_side(
    stage: str, side: str, spec: Mapping[str, Any], folder: Path, *, threads: int, device: str, timeout: float
) -> Measured:
    """Runs one side in a fresh process and reads what it measured.

    Arguments:
        stage: name in ``benchmarks.peer_stages``.
        side: ``ptl`` or ``peer``.
        spec: what ``make_spec`` gave.
        folder: for the exchange of files.
        threads: threads of one operation on the CPU.
        device: ``cpu`` or ``cuda``.
        timeout: seconds.

    Raises:
        RuntimeError: the process failed or took longer than ``timeout``, with the last lines of what it wrote.
    """
    inputs, output = folder / f"{side}-in.json", folder / f"{side}-out.json"
    output.unlink(missing_ok=True)
    inputs.write_text(json.dumps(dict(spec)), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.peer_tools", stage, side, str(inputs), str(output)]
    log, start = folder / f"{side}.log", time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT}
        try:
            done = subprocess.run(command, env=environment(threads, device), timeout=timeout, check=False, **streams)
            how = f"ended with code {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            how = f"did not end within --timeout {timeout:g} s"
    if how is not None:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise RuntimeError(f"the {side} side of stage {stage} {how}:\n{tail}")
    found = Measured(**json.loads(output.read_text(encoding="utf-8")))
    return replace(found, process_seconds=time.perf_counter() - start)


def environment(threads: int, device: str) -> dict[str, str]:
    """The environment of a measured process: the same threads for both sides, nothing fetched, one GPU or none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "CUDA_VISIBLE_DEVICES": visible if device == "cuda" else "",
        **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}),
    }


def check_same_work(pair: Pair) -> None:
    """Holds both sides to the same rows in the same order.

    Raises:
        ValueError: a step of the two had another count of tokens or of trained tokens.
    """
    for name in ("useful_tokens", "trained_tokens"):
        ours, theirs = getattr(pair.ptl, name), getattr(pair.peer, name)
        if len(ours) != len(theirs):
            raise ValueError(f"ptl ran {len(ours)} steps and the peer {len(theirs)}: no comparison")
        for step, (our, their) in enumerate(zip(ours, theirs)):
            if our != their:
                raise ValueError(f"step {step}: {name} are {our} for ptl and {their} for the peer: no comparison")


def compare(pairs: Sequence[Pair], *, warmup: int, dtype: str, peak: float | None = None) -> dict[str, Any]:
    """What the pairs say, with every key of a comparison's line that depends on the measurements.

    ``ratio`` is our useful tokens a second over the peer's and ``memory_ratio`` our peak over the peer's; both are
    medians over the pairs. Rates count the steps after ``warmup``.

    Arguments:
        pairs: at least one.
        warmup: first steps of each run that are left out of times and rates.
        dtype: key of ``Measured.matmul_rates`` that the arithmetic was mostly done in.
        peak: what the device does at most in that type, FLOP/s, by its maker; None leaves ``mfu`` out.
    """
    for pair in pairs:
        check_same_work(pair)
    sides = {"ptl": [pair.ptl for pair in pairs], "peer": [pair.peer for pair in pairs]}

    def median(of: Callable[[Measured], float], digits: int) -> dict[str, float]:
        return {name: round(statistics.median(of(run) for run in runs), digits) for name, runs in sides.items()}

    def median_ratio(of: Callable[[Measured], float]) -> float:
        return round(statistics.median(of(pair.ptl) / of(pair.peer) for pair in pairs), 3)

    every = [run for runs in sides.values() for run in runs]
    return {
        "ratio": median_ratio(lambda run: _rate(run.useful_tokens, run.seconds, warmup)),
        "memory_ratio": median_ratio(lambda run: run.peak_bytes),
        "pairs": len(pairs),
        "steps": len(pairs[0].ptl.seconds),
        "warmup": warmup,
        "process_seconds": median(lambda run: run.process_seconds, 1),
        "first_step_seconds": median(lambda run: run.seconds[0], 1),
        "step_seconds": {name: _step_seconds(runs, warmup) for name, runs in sides.items()},
        "cpu_seconds_per_step": median(lambda run: _mean(run.cpu_seconds[warmup:]), 3),
        "useful_tokens_per_second": median(lambda run: _rate(run.useful_tokens, run.seconds, warmup), 1),
        "trained_tokens_per_second": median(lambda run: _rate(run.trained_tokens, run.seconds, warmup), 1),
        "computed_over_useful": median(lambda run: sum(run.computed_tokens) / sum(run.useful_tokens), 3),
        "peak_gb": median(lambda run: run.peak_bytes / 1e9, 3),
        "start_gb": median(lambda run: run.start_bytes / 1e9, 3),
        "matmul_gflops": {
            kind: round(statistics.median(run.matmul_rates[kind] for run in every) / 1e9, 1)
            for kind in every[0].matmul_rates
        },
        "share_of_matmul": median(lambda run: _share(run, warmup, dtype), 3),
        **({} if peak is None else {"mfu": median(lambda run: _rate(run.flops, run.seconds, warmup) / peak, 3)}),
        "losses": _losses(pairs),
        "settings": {name: runs[0].settings for name, runs in sides.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rate(counts: Sequence[float], seconds: Sequence[float], warmup: int) -> float:
    return sum(counts[warmup:]) / sum(seconds[warmup:])


def _share(run: Measured, warmup: int, dtype: str) -> float:
    """What the step needs, done at the rate of a plain matrix product, over what it took."""
    return _rate(run.flops, run.seconds, warmup) / run.matmul_rates[dtype]


def _step_seconds(runs: Sequence[Measured], warmup: int) -> dict[str, float]:
    seconds = [s for run in runs for s in run.seconds[warmup:]]
    return {
        "median": round(statistics.median(seconds), 3),
        "min": round(min(seconds), 3),
        "max": round(max(seconds), 3),
    }


def _losses(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The first steps' losses in the first pair, and the largest difference in any pair."""
    shown = slice(0, SHOWN_STEPS)
    differences = [
        abs(our - their) for pair in pairs for our, their in zip(pair.ptl.losses[shown], pair.peer.losses[shown])
    ]
    return {
        "ptl": [round(loss, 6) for loss in pairs[0].ptl.losses[shown]],
        "peer": [round(loss, 6) for loss in pairs[0].peer.losses[shown]],
        "largest_difference": round(max(differences), 7),
    }


def write(measured: Measured, path: Path) -> None:
    """What a measured process hands back."""
    path.write_text(json.dumps(asdict(measured)), encoding="utf-8")
