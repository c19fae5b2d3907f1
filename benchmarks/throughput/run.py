"""One cell measured: the real command in processes of its own, and what its run folder says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.throughput.cells import Cell, Setting, config_of

KEPT = (
    "tokens_per_second", "tokens_per_second_deviation", "trained_tokens_per_second", "padded_tokens_per_second",
    "tokens_per_second_per_device", "flops_per_second_per_device", "mfu", "padding_fraction", "data_wait_fraction",
    "step_seconds_median", "step_seconds_p90", "peak_memory_gib", "measured_steps",
)  # fmt: skip
MEMORY = re.compile(r"OutOfMemoryError|out of memory|not enough memory|Cannot allocate memory", re.IGNORECASE)


def run_cell(cell: Cell, setting: Setting, folder: Path, *, timeout: float) -> dict[str, Any]:
    """Runs a cell; whatever becomes of it is a result.

    Returns:
        The cell's own keys; ``outcome``: ``ok``, ``out of memory``, ``timeout`` or ``failed``; then either what the
        run's summary says of its throughput, or ``error``, the last telling line of its log.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.yaml").write_text(yaml.safe_dump(config_of(cell, setting, folder)), encoding="utf-8")
    files = [*setting.layers, str(folder / "cell.yaml")]
    command = [sys.executable, "-m", "ptl.cli", "fit", *(word for file in files for word in ("-c", file))]
    begun = time.perf_counter()
    code = _run(command, folder / "log", timeout, setting.accelerator)
    log = (folder / "log").read_text(errors="replace")
    return {**asdict(cell), "variant": cell.variant, **outcome(code, log, summary_of(folder / "run")),
            "wall_seconds": round(time.perf_counter() - begun, 1)}  # fmt: skip


def outcome(code: int | None, log: str, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """What became of a run.

    Arguments:
        code: exit code; None where it was ended for its time.
        log: what it wrote.
        summary: of its run folder; None where there is none.
    """
    if code is None:
        return {"outcome": "timeout", "error": _last_line(log)}
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or (code and MEMORY.search(log)):
        return {"outcome": "out of memory", "error": _last_line(log)}
    measured = (summary or {}).get("throughput") or {}
    if code or not measured.get("measured_steps"):
        return {"outcome": "failed", "error": _last_line(log)}
    return {"outcome": "ok", **{name: _short(measured.get(name)) for name in KEPT}}


def _short(value: Any) -> Any:
    """Five digits tell all that such a measurement knows."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|killed|exception", line, re.IGNORECASE)]
    return (telling or lines or [""])[-1][:300]


def summary_of(run: Path) -> dict[str, Any] | None:
    """``summary.json`` of a run folder; None where there is none."""
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _run(command: list[str], log: Path, timeout: float, accelerator: str) -> int | None:
    """Exit code of a command, or None where it took too long and was ended with all that it had started."""
    env = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled", **os.environ}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if accelerator == "cpu" else {}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
