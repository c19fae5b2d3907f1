"""Packing and order plan of 100 million rows with simulated lengths: memory, time, and the cost of a jump.

    python -m benchmarks.plan_scale [--rows 100000000] [--pack-to 2048]

Lengths are log-normal (median 245 tokens, cut to 16 to 2,048), written to disk first and memory-mapped, as prepared
rows are. The measured process does what a rank's data module does: makes the packs, keeps them, opens them again and
reads optimizer steps at the start and at the far end of an epoch, with weights and row indices, for 64 ranks. Peak
memory is the process's highest resident set, mapped pages of lengths, weights and packs included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from ptl.data.loader import train_batches
from ptl.data.order import Plan
from ptl.data.units import Units, build_units, cached_units

COLUMNS = {"lengths": np.int32, "weights": np.float32, "source_ids": np.int16}
_CHUNK = 1 << 22
_RANKS, _ACCUMULATE, _MICRO = 64, 1, 4


@dataclass(frozen=True)
class SimulatedRows:
    """The columns of prepared rows that a plan reads."""

    lengths: np.ndarray
    weights: np.ndarray
    source_ids: np.ndarray
    rows: Any = None


def simulate(folder: Path, count: int, longest: int) -> None:
    """Writes ``lengths.npy``, ``weights.npy`` and ``source_ids.npy``, a chunk at a time."""
    columns = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (count,)) for name, kind in COLUMNS.items()
    }
    rng = np.random.default_rng(0)
    for begin in range(0, count, _CHUNK):
        size = min(_CHUNK, count - begin)
        lengths = np.clip(rng.lognormal(5.5, 0.8, size), 16, longest).astype(np.int32)
        columns["lengths"][begin : begin + size] = lengths
        columns["weights"][begin : begin + size] = lengths // 3
    for column in columns.values():
        column.flush()


def measure(folder: Path, capacity: int) -> dict[str, Any]:
    """Plans the rows in ``folder`` and times it."""
    table = SimulatedRows(
        *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("lengths", "weights", "source_ids"))
    )
    imported = _peak_bytes()
    start = time.perf_counter()
    cached_units(folder / "units", table, lambda: build_units(table, weights=(1.0,), capacity=capacity, seed=0))
    planned = time.perf_counter() - start
    start = time.perf_counter()
    units = cached_units(folder / "units", table, lambda: build_units(table, weights=(1.0,), capacity=capacity, seed=0))
    opened = time.perf_counter() - start
    jumps = {}
    last = Plan(units=units.entries, world_size=_RANKS, accumulate=_ACCUMULATE, micro_batch_size=_MICRO).steps - 1
    for name, step in {"first": 10, "far": last - 10}.items():
        for pages in ("cold", "warm"):  # the first visit reads pages of lengths, weights and packs from the disk
            times = [_jump_seconds(units, (step + offset) * _RANKS * _ACCUMULATE * _MICRO) for offset in range(10)]
            jumps[f"jump_{name}_{pages}_ms"] = round(1e3 * float(np.median(times)), 3)
        jumps[f"jump_{name}_step"] = step
    single = Plan(units=len(table.lengths))
    for name, step in {"10": 10, "million": 10**6}.items():
        times = []
        for _ in range(21):
            start = time.perf_counter()
            single.window(min(step, single.steps - 1))
            times.append(time.perf_counter() - start)
        jumps[f"window_of_rows_at_step_{name}_ms"] = round(1e3 * float(np.median(times)), 3)
    return {
        "rows": len(table.lengths),
        "capacity": capacity,
        "units": len(units),
        "utilisation": round(units.summary()["utilisation"], 6),
        "plan_seconds": round(planned, 2),
        "open_seconds": round(opened, 4),
        "rows_per_second": round(len(table.lengths) / planned),
        **jumps,
        "peak_rss_bytes": _peak_bytes(),
        "peak_rss_bytes_after_imports": imported,
    }


def _jump_seconds(units: Units, start: int) -> float:
    """Time to the first micro-batch of a pass that begins ``start`` units into an epoch."""
    began = time.perf_counter()
    plan = Plan(
        units=units.entries,
        epoch=1,
        world_size=_RANKS,
        accumulate=_ACCUMULATE,
        micro_batch_size=_MICRO,
        start=start,
    )
    next(train_batches(plan, units, rank=_RANKS - 1, bucket=False))
    return time.perf_counter() - began


def _peak_bytes() -> int:
    """Highest resident set of this process. ``getrusage`` would count that of the parent it was forked from."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def _child(folder: str, capacity: int, connection: Any) -> None:
    connection.send(measure(Path(folder), capacity))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--pack-to", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        simulate(Path(name), options.rows, options.pack_to)
        # A process of its own: this one's peak holds the simulation.
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_child, args=(name, options.pack_to, there))
        process.start()
        there.close()
        try:
            figures = here.recv()
        finally:
            process.join(10)
    line = record.append("plan_scale", {"stage": "data", "variant": f"packed-{options.pack_to}", **figures})
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main()
