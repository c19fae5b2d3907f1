"""A run folder as ``ptl fit`` leaves it, whole, unfinished or damaged, read for a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.apps.comparing.configs import parse_config, run_digest
from ptl.apps.comparing.rows import metrics_of, read_log, read_times
from ptl.apps.comparing.runs import UNFINISHED, Metric, Run

if TYPE_CHECKING:
    import numpy as np

METRICS, SUMMARY, ATTEMPTS = "metrics.jsonl", "summary.json", "attempts.jsonl"
SHARED_FACTS = ("tokens_per_second_per_device", "mfu", "peak_memory_gib")


def is_run_folder(names: set[str]) -> bool:
    """Whether a folder with these files holds a run."""
    return bool(names & {METRICS, SUMMARY, ATTEMPTS})


def read_folder(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        OSError: a file that is there cannot be read.
    """
    text = _text(folder / "config.yaml")
    config = parse_config(text)
    logged = (folder / METRICS).exists()
    metrics = metrics_of(read_log(folder / METRICS)) if logged else {}
    summary, environment = (_mapping(folder / name) for name in (SUMMARY, "environment.json"))
    events = [row for line in _text(folder / ATTEMPTS).splitlines() if (row := _row(line))]
    starts = [row for row in events if row.get("event") == "start"]
    ended = not events or events[-1].get("event") == "end"  # else a newer attempt goes on, or was killed
    wall = _number(summary.get("wall_seconds_all_attempts")) if ended else None
    hours = _number(summary.get("device_hours")) if ended else None
    devices = summary.get("devices") or (starts[-1].get("world_size") if starts else None)
    if hours is None and wall is None and logged:
        hours = _device_hours(events, read_times(folder / METRICS), devices)
    variables = environment.get("variables")
    named = variables.get("WANDB_RUN_ID") if isinstance(variables, dict) else None
    return Run(
        name=folder.resolve().name,
        where=str(folder),
        source="folder",
        status=str(summary.get("status") or UNFINISHED) if ended else UNFINISHED,
        config=config,
        metrics=metrics,
        facts=facts_of(summary.get("throughput"), metrics, wall, devices, hours),
        error=summary.get("error") if ended else None,
        attempts=len(starts) or summary.get("attempts"),
        devices=devices,
        step=summary.get("global_step") if ended and summary else last_step(metrics),
        monitor=summary.get("monitor"),
        wandb_id=named or _mapping(folder / "run.json").get("id"),
        wall=wall,
        digest=run_digest(text, config),
    )


def facts_of(
    throughput: Any, metrics: Mapping[str, Metric], seconds: Any, devices: Any, hours: Any = None
) -> dict[str, float]:
    """Throughput, memory and device-hours: as the run's end summed them up, else by the windows that were logged.

    Device-hours that are not known are the seconds of all attempts times the last one's devices.
    """
    facts = {}
    for name in SHARED_FACTS:
        value = _number(throughput.get(name) if isinstance(throughput, Mapping) else None)
        logged = metrics.get(f"throughput/{name}")
        if value is None and logged is not None:
            value = _number(logged.high if name == "peak_memory_gib" else logged.mean)
        if value is not None:
            facts[name] = value
    spent, count = _number(seconds), _number(devices)
    if (known := _number(hours)) is not None:
        facts["device_hours"] = known
    elif spent is not None and count is not None:
        facts["device_hours"] = spent * count / 3600
    return facts


def last_step(metrics: Mapping[str, Metric]) -> int | None:
    """Optimizer steps that the metrics tell of."""
    return max((m.final_step + 1 for m in metrics.values()), default=None)


def _device_hours(events: list[dict[str, Any]], times: np.ndarray, devices: Any) -> float | None:
    """Hours of all attempts times the devices of each; one without an end counts up to its last row of metrics."""
    timed = [row for row in events if _number(row.get("time")) is not None]
    starts = [row for row in timed if row.get("event") == "start"]
    ends = {row.get("attempt"): row["time"] for row in timed if row.get("event") == "end"}
    total = 0.0
    for row, following in zip(starts, [*starts[1:], None], strict=True):
        until = following["time"] if following else math.inf
        signs = times[(times >= row["time"]) & (times < until)]
        seconds = ends.get(row.get("attempt"), float(signs.max()) if len(signs) else row["time"]) - row["time"]
        count = _number(row.get("world_size", devices))
        if count is None:
            return None
        total += seconds * count / 3600
    return total


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _mapping(path: Path) -> dict[str, Any]:
    return _row(_text(path)) or {}


def _row(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
