"""The comparison itself: groups and runs with their numbers, as a dict of JSON values that every page is made of.

::

    {"groups":  [{"tag", "label", "config", "runs", "status", "complete", "metrics": {name: {"final", "best"}},
                  "facts": {name: spread}, "device_hours", "cost"}],
     "runs":    [{"name", "group", "seeds", "source", "where", "status", "error", "attempts", "devices", "step",
                  "metrics": {name: {"final", "final_step", "best", "best_step", "low", "high", "points"}},
                  "facts", "cost"}],
     "keys": [...], "seeds": [...], "shown": [metric, ...], "metrics": {name: "min" | "max" | None}, "notes": [...]}

A spread is ``{"mean", "deviation", "n"}`` over the runs of a group, with the deviation of a sample (n - 1).
"""

from __future__ import annotations

import difflib
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptl.apps.comparing.configs import ABSENT, Group, Grouping, text_of
from ptl.apps.comparing.folders import SHARED_FACTS
from ptl.apps.comparing.runs import ENDED, Metric, Run

MOST_SHOWN = 4
"""Metrics in tables where none were asked for."""
_FIRST = ("val/loss", "val/accuracy", "val/reward", "train/loss", "train/reward")
_LOWER = {"loss", "perplexity", "ppl", "nll", "kl", "error", "wer", "cer", "ece", "bpb", "mse", "mae"}
_HIGHER = {"accuracy", "acc", "reward", "score", "wins", "win", "pass", "f1", "bleu", "rouge", "tau", "margin"}
_HIGHER |= {"return", "agreement", "auc"}
_QUALIFIERS = {"mean", "avg", "all", "rate", "of", "k"}

Comparison = dict[str, Any]


def compared(
    runs: Sequence[Run], grouping: Grouping, *, metrics: Sequence[str] = (), price: float | None = None
) -> Comparison:
    """Compares runs.

    Arguments:
        runs: the runs that ``grouping`` parts into groups.
        metrics: those to show; by default what the runs monitor and the most usual ones.
        price: of one device for an hour, in any currency.

    Returns:
        The comparison; its groups are in order of their best or final value of the first metric.

    Raises:
        ValueError: no run has a metric that was asked for.
    """
    names = sorted({name for run in runs for name in run.metrics})
    for name in metrics:
        if name not in names:
            near = ", ".join(difflib.get_close_matches(name, names, n=3)) or ", ".join(names[:8])
            raise ValueError(f"--metric got {name}, expected one that the runs logged, such as {near}")
    shown = list(metrics) or shown_metrics(runs, names)
    rows = [_run(run, price) for run in runs]
    entries = [_group(group, rows, names) for group in grouping.groups]
    entries.sort(key=lambda entry: _rank(entry, shown))
    for i, entry in enumerate(entries):
        entry["tag"] = tag(i)
        for index in entry["runs"]:
            rows[index]["group"] = entry["tag"]
            rows[index]["seeds"] = {key: runs[index].config[key] for key in grouping.seeds if key in runs[index].config}
    return {
        "groups": entries,
        "runs": rows,
        "keys": list(grouping.keys),
        "seeds": list(grouping.seeds),
        "shown": shown,
        "metrics": {name: direction(name) for name in names},
        "priced": price is not None,
        "notes": [],
    }


def direction(name: str) -> str | None:
    """``min`` or ``max`` where a metric's name says which is better, else None."""
    for word in reversed(re.split(r"[/_.@\s-]+", name.lower())):
        if word in _LOWER:
            return "min"
        if word in _HIGHER:
            return "max"
        if word not in _QUALIFIERS and not word.isdigit():
            return None
    return None


def shown_metrics(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """What the runs monitor and the usual metrics, else others of validation, else any: ``MOST_SHOWN`` at most."""
    monitored = Counter(run.monitor for run in runs if run.monitor in run.metrics)
    held_out = [name for name in names if name.startswith(("val/", "test/", "eval/"))]
    other = [name for name in names if not name.startswith(("throughput/", "health/", "lr-", "system"))]
    ordered = [*(str(name) for name, _ in monitored.most_common()), *(n for n in _FIRST if n in names)]
    more = held_out if len(set(ordered)) < 2 else ()
    return list(dict.fromkeys([*ordered, *more, *(other if not ordered else ())]))[:MOST_SHOWN]


def tag(index: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    return (tag(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def spread(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Mean, deviation and number of the values that are there; the mean of none is None."""
    known = [value for value in values if value is not None]
    finite = all(map(math.isfinite, known))
    return {
        "mean": statistics.fmean(known) if known else None,
        "deviation": statistics.stdev(known) if len(known) > 1 and finite else None,
        "n": len(known),
    }


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of each key that tell it from the others."""
    out = {}
    for key in keys:
        parts = key.split(".")
        for depth in range(1, len(parts) + 1):
            short = ".".join(parts[-depth:])
            if parts[-depth].isdigit():
                continue
            if sum(other in (key, short) or other.endswith("." + short) for other in keys) == 1:
                break
        out[key] = short
    return out


def _run(run: Run, price: float | None) -> dict[str, Any]:
    hours = run.facts.get("device_hours")
    return {
        "name": run.name,
        "group": None,
        "seeds": {},
        "source": run.source,
        "where": run.where,
        "status": run.status,
        "error": run.error,
        "attempts": run.attempts,
        "devices": run.devices,
        "step": run.step,
        "metrics": {name: _metric(metric, direction(name)) for name, metric in run.metrics.items()},
        "facts": dict(run.facts),
        "cost": None if price is None or hours is None else hours * price,
    }


def _metric(metric: Metric, better: str | None) -> dict[str, Any]:
    best = {"min": (metric.low, metric.low_step), "max": (metric.high, metric.high_step)}.get(better or "")
    return {
        "final": metric.final,
        "final_step": metric.final_step,
        "best": None if best is None or math.isnan(best[0]) else best[0],
        "best_step": None if best is None or math.isnan(best[0]) else best[1],
        "low": metric.low,
        "high": metric.high,
        "points": metric.points,
    }


def _group(group: Group, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    members = [rows[i] for i in group.members]
    complete = [row for row in members if row["status"] in ENDED]
    counted = complete or members
    have = [name for name in names if any(name in row["metrics"] for row in counted)]
    keys = short_keys(list(group.config))
    hours = [row["facts"].get("device_hours") for row in members]
    costs = [row["cost"] for row in members]
    return {
        "tag": "",
        "label": ", ".join(f"{keys[key]}={text_of(value)}" for key, value in group.config.items()),
        "config": dict(group.config),
        "runs": list(group.members),
        "status": dict(Counter(row["status"] for row in members)),
        "complete": len(complete),
        "metrics": {
            name: {
                which: spread(row["metrics"].get(name, {}).get(which) for row in counted) for which in ("final", "best")
            }
            for name in have
        },
        "facts": {name: spread(row["facts"].get(name) for row in counted) for name in SHARED_FACTS},
        "device_hours": math.fsum(h for h in hours if h is not None) if any(h is not None for h in hours) else None,
        "cost": math.fsum(c for c in costs if c is not None) if any(c is not None for c in costs) else None,
    }


def _rank(entry: Mapping[str, Any], shown: Sequence[str]) -> tuple[bool, float]:
    """Sorts the better group first; those without the number, or with NaN, come last."""
    found = entry["metrics"].get(shown[0]) if shown else None
    value = found["final"]["mean"] if found else None
    if value is None or math.isnan(value):
        return True, 0.0
    return False, -value if direction(shown[0]) == "max" else value


def value_text(config: Mapping[str, Any], key: str) -> str:
    """The value of a key in a group's configuration as text, a dash where it has none."""
    return text_of(config.get(key, ABSENT))
