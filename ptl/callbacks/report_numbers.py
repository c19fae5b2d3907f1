"""The numbers of a distillation report as JSON holds them: gaps computed, infinities spelt, trees made flat."""

from __future__ import annotations

import math
from typing import Any

Entry = dict[str, Any]
SAME_WEIGHT = 1e-9
"""Relative difference of loss weights up to which two measurements were on the same rows."""


def with_gaps(models: list[Entry], before: Entry | None, notes: list[str]) -> list[Entry]:
    """The models with ``before`` in its place and ``gap_closed`` beside each KL.

    The teacher's own KL is 0, so what lay between the student before and the teacher is ``KL before``, and
    ``gap_closed`` is ``(KL before - KL) / KL before``: 0 for nothing learned, 1 for the teacher itself, negative where
    a model is farther away than the student was.

    Args:
        models: entries as ``ModelMeter`` makes them; the teacher first, if it is there.
        before: the student before training, or None.
        notes: gets a line where ``before`` was measured on other rows, which then give no gap.
    """
    if before is None:
        return models
    at = int(bool(models) and models[0]["name"] == "teacher")
    out = [*models[:at], before, *[dict(model) for model in models[at:]]]
    for model in out[at + 1 :]:
        model["parts"] = {part: dict(found) for part, found in model["parts"].items()}
        for part, found in model["parts"].items():
            first = before["parts"].get(part)
            if first is None or not _same_rows(found["all"], first["all"]):
                line = f"The student before training was measured on other {part} rows, so there is no gap to give."
                notes += [] if line in notes else [line]
                continue
            found["all"] = _with_gap(found["all"], first["all"])
            found["sources"] = {
                name: _with_gap(own, first["sources"].get(name)) for name, own in found["sources"].items()
            }
    return out


def _same_rows(one: Entry, other: Entry) -> bool:
    return math.isclose(one["weight"], other["weight"], rel_tol=SAME_WEIGHT)


def _with_gap(after: Entry, before: Entry | None) -> Entry:
    first, last = (before or {}).get("kl"), after.get("kl")
    if first is None or last is None or not math.isfinite(first) or first <= 0:
        return {**after, "gap_closed": None}
    return {**after, "gap_closed": (first - last) / first}


def json_ready(tree: Any) -> Any:
    """Numbers that JSON lacks as strings (``inf``, ``nan``), everywhere in a tree."""
    if isinstance(tree, dict):
        return {key: json_ready(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [json_ready(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def from_json(tree: Any) -> Any:
    """What ``json_ready`` spelt as numbers again; the names of models and sources are keys or under ``name``."""
    if isinstance(tree, dict):
        return {key: value if key == "name" else from_json(value) for key, value in tree.items()}
    return float(tree) if tree in ("inf", "-inf", "nan") else tree


def flat(models: list[Entry]) -> dict[str, float]:
    """``{"report/after/special/kl": 0.4, "report/after/bytes": 1e8}`` for the loggers; unknown numbers are left out."""
    out: dict[str, Any] = {}
    for model in models:
        stem = f"report/{model['name']}"
        out |= {f"{stem}/{key}": model[key] for key in ("parameters", "bytes", "tokens_per_second")}
        for part, found in model["parts"].items():
            out |= {f"{stem}/{part}/{key}": value for key, value in found["all"].items() if key != "weight"}
    return {key: value for key, value in out.items() if isinstance(value, int | float) and math.isfinite(value)}
