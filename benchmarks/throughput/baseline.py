"""Figures kept in git that another machine can be held to, and what counts as a regression.

A step's time is kept as the share of the machine's own matrix product that the step reaches, measured around it;
memory in GiB. ``benchmarks/baselines/<name>.json`` holds the cells with these figures and their tolerances.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.throughput.cells import Cell

FOLDER = Path(__file__).parent.parent / "baselines"
TOLERANCE = {"share_of_matmul": 0.25, "peak_memory_gib": 0.1}
"""Relative loss of speed, and growth of memory, that is still none."""


def read(path: Path) -> dict[str, Any]:
    """A baseline's contents.

    Raises:
        ValueError: there is none, or it is not one.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        cells = [Cell(**line["cell"]) for line in held["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no baseline ({error}): make one with `check --update`") from None
    return {**held, "keys": cells}


def make(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A baseline of measured cells.

    Raises:
        ValueError: a cell has failed.
    """
    failed = [line for line in lines if line["outcome"] != "ok"]
    if failed:
        raise ValueError(f"{failed[0]['strategy']} {failed[0]['variant']} has failed: {failed[0].get('error')}")
    names = Cell.__dataclass_fields__
    return {
        **settings,
        "device": lines[0]["device"],
        "date": lines[0]["date"],
        "versions": lines[0]["versions"],
        "tolerance": TOLERANCE,
        "cells": [
            {
                "cell": asdict(Cell(**{name: line[name] for name in names})),
                **{name: line[name] for name in TOLERANCE},
            }
            for line in lines
        ],
    }


def regressions(held: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has become worse than the tolerances allow, a line each.

    Arguments:
        held: a baseline.
        lines: the same cells, measured now, in the same order.
    """
    found = []
    for was, now in zip(held["cells"], lines, strict=True):
        cell = Cell(**was["cell"])
        name = f"{cell.objective} {cell.variant} {cell.strategy} on {cell.ranks} ranks"
        if now["outcome"] != "ok":
            found.append(f"{name}: {now['outcome']}: {now.get('error')}")
            continue
        slower = 1 - now["share_of_matmul"] / was["share_of_matmul"]
        larger = now["peak_memory_gib"] / was["peak_memory_gib"] - 1
        for change, key, what in ((slower, "share_of_matmul", "slower"), (larger, "peak_memory_gib", "larger")):
            if change > held["tolerance"][key]:
                text = f"{change:.0%} {what} than the baseline: {key} {now[key]:.4g}, was {was[key]:.4g}"
                found.append(f"{name}: {text}; tolerated {held['tolerance'][key]:.0%}")
    return found
