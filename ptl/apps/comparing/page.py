"""A comparison as one HTML file: no network, no other file; sortable tables and curves with a choice of the metric."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from ptl.apps.comparing.configs import text_of
from ptl.apps.comparing.curves import COLORS, bands
from ptl.apps.comparing.runs import POINTS, Run
from ptl.apps.comparing.summary import Comparison, short_keys
from ptl.apps.comparing.tables import FACT_TITLES, METHOD, headline, json_ready

MOST_POINTS = 150_000
"""Points of all curves in a page, about 4 MB of it; buckets get wider, then curves fewer, to stay below."""
_FEWEST = 32


def html(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The page."""
    page = files("ptl.apps.comparing") / "page"
    text = (page / "compare.html").read_text(encoding="utf-8")
    data = json.dumps(json_ready(_data(comparison, runs)), ensure_ascii=False, separators=(",", ":"), default=str)
    parts = {
        "STYLE": (page / "compare.css").read_text(encoding="utf-8"),
        # Inside a script element "<" is all that could end it.
        "DATA": data.replace("<", "\\u003c"),
        "TABLES": (page / "tables.js").read_text(encoding="utf-8"),
        "CHART": (page / "chart.js").read_text(encoding="utf-8"),
    }
    before, *marked = text.split("/*PTL:")
    out = [before]
    for piece in marked:
        name, _, rest = piece.partition("*/")
        out += [parts[name], rest]
    return "".join(out)


def _data(comparison: Comparison, runs: Sequence[Run]) -> dict[str, Any]:
    """What the page's script shows, with six significant digits."""
    names = [*comparison["shown"], *(name for name in comparison["metrics"] if name not in comparison["shown"])]
    groups = len(comparison["groups"])
    drawn = names[: max(len(comparison["shown"]), MOST_POINTS // (_FEWEST * groups))]
    points = max(_FEWEST, min(POINTS, MOST_POINTS // (groups * max(len(drawn), 1))))
    notes = [*METHOD, *comparison["notes"]]
    if len(drawn) < len(names):
        notes.append(f"Curves of {len(names) - len(drawn)} more metrics are left out: --metric NAME brings one in.")
    return {
        "title": headline(comparison),
        "keys": [[short, key] for key, short in short_keys(comparison["keys"]).items()],
        "seeds": [[short, key] for key, short in short_keys(comparison["seeds"]).items()],
        "facts": list(FACT_TITLES.items()),
        "priced": comparison["priced"],
        "shown": comparison["shown"],
        "drawn": drawn,
        "better": {name: comparison["metrics"][name] for name in drawn},
        "colors": COLORS,
        "groups": [_group(group, drawn) for group in comparison["groups"]],
        "runs": [_run(run, drawn) for group in comparison["groups"] for run in _members(comparison, group)],
        "curves": {name: _curves(comparison, runs, name, points) for name in drawn},
        "notes": notes,
    }


def _members(comparison: Comparison, group: dict[str, Any]) -> list[dict[str, Any]]:
    return [comparison["runs"][i] for i in group["runs"]]


def _group(group: dict[str, Any], drawn: Sequence[str]) -> dict[str, Any]:
    metrics = {name: found for name, found in group["metrics"].items() if name in set(drawn)}
    kept = ("tag", "label", "status", "complete", "device_hours", "cost", "facts")
    config = {key: text_of(value) for key, value in group["config"].items()}
    return _rounded({**{key: group[key] for key in kept}, "metrics": metrics, "config": config})


def _run(run: dict[str, Any], drawn: Sequence[str]) -> dict[str, Any]:
    metrics = {
        name: [run["metrics"][name]["final"], run["metrics"][name]["best"]] for name in drawn if name in run["metrics"]
    }
    kept = ("name", "group", "status", "error", "attempts", "step", "where", "facts", "cost")
    seeds = {key: text_of(value) for key, value in run["seeds"].items()}
    return _rounded({**{key: run[key] for key in kept}, "metrics": metrics, "seeds": seeds})


def _curves(comparison: Comparison, runs: Sequence[Run], name: str, points: int) -> dict[str, Any]:
    """Steps, means, deviations and numbers of runs of each group; deviations are left out where all are 0."""
    out = {}
    for tag, band in bands(comparison, runs, name, points).items():
        lines = [band.step.round(1), band.mean, *([band.deviation] if band.deviation.any() else [])]
        out[tag] = [[_round(value) for value in line.tolist()] for line in lines]
    return out


def _rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return _round(tree) if isinstance(tree, float) else tree


def _round(value: float) -> float | int:
    if not math.isfinite(value):
        return value
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() else short
