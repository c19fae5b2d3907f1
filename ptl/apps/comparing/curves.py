"""Learning curves of groups: mean over runs in buckets of steps, the deviation between them, and a picture of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.apps.comparing.runs import POINTS, Curve, Run, bucket_width, coarser
from ptl.apps.comparing.summary import Comparison

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#777777", "#000000")
"""Okabe and Ito's colours, which people with any colour vision tell apart."""
_PANELS = 6
_LINES = 8
"""Groups that are drawn in colour; more cannot be told apart."""


@dataclass(frozen=True)
class Band:
    """A metric of a group over steps.

    Attributes:
        step, mean: float64 [N].
        deviation: float64 [N], between runs (n - 1); 0 where one run has values.
        runs: int64 [N], how many runs have values there.
    """

    step: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    runs: np.ndarray


def band(curves: Sequence[Curve], points: int = POINTS) -> Band | None:
    """Mean and deviation over runs at steps that they share; None where no run has a finite value.

    Arguments:
        curves: of one metric, a run each.
        points: most steps of the band.
    """
    import numpy as np

    curves = [found for found in curves if len(found.bucket)]
    if not curves:
        return None
    last = max(int(found.bucket[-1] + 1) * found.width - 1 for found in curves)
    width = max(bucket_width(last, points), *(found.width for found in curves))
    same = [coarser(found, width) for found in curves]
    bucket = np.concatenate([found.bucket for found in same])
    values = np.concatenate([found.mean for found in same])
    runs = np.bincount(bucket)
    kept = np.flatnonzero(runs)
    number = runs[kept]
    mean = np.bincount(bucket, values)[kept] / number
    apart = values - mean[np.searchsorted(kept, bucket)]
    variance = np.bincount(bucket, apart * apart)[kept] / np.maximum(number - 1, 1)
    step = np.bincount(bucket, np.concatenate([found.step for found in same]))[kept] / number
    return Band(step, mean, np.sqrt(variance), number)


def bands(comparison: Comparison, runs: Sequence[Run], name: str, points: int = POINTS) -> dict[str, Band]:
    """The band of a metric for each group that has it, by the group's tag."""
    found = {
        group["tag"]: band([runs[i].metrics[name].curve for i in group["runs"] if name in runs[i].metrics], points)
        for group in comparison["groups"]
    }
    return {tag: each for tag, each in found.items() if each is not None}


# ---- the picture ----


def draw(comparison: Comparison, runs: Sequence[Run], path: Path) -> None:
    """Writes the curves of the metrics that are shown as PNG: a line a group, a band for the deviation over runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = comparison["shown"][:_PANELS]
    groups = comparison["groups"]
    columns = min(len(shown), 2)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5.6 * columns, 3.6 * rows + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis, name in zip(axes, shown, strict=False):
        _panel(axis, bands(comparison, runs, name), groups, name)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = sorted(handles)  # tags of lines in colour are single letters, the best group first
    figure.legend([handles[label] for label in labels], labels, loc="outside lower left", frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _panel(axis: Axes, found: dict[str, Band], groups: Sequence[dict[str, Any]], name: str) -> None:
    from matplotlib.collections import LineCollection

    others = [found[group["tag"]] for group in groups[_LINES:] if group["tag"] in found]
    lines = [list(zip(each.step, each.mean, strict=True)) for each in others]
    axis.add_collection(LineCollection(lines, colors="#CCCCCC", linewidths=0.6, zorder=1))
    for i, group in reversed(list(enumerate(groups[:_LINES]))):
        each = found.get(group["tag"])
        if each is None:
            continue
        color = COLORS[i]
        mark = "o" if len(each.step) == 1 else None
        axis.plot(each.step, each.mean, color=color, linewidth=1.6, label=_label(group), zorder=3, marker=mark)
        if each.deviation.any():
            low, high = each.mean - each.deviation, each.mean + each.deviation
            axis.fill_between(each.step, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)
    axis.autoscale_view()
    axis.set_title(name, loc="left", fontsize=11)
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.grid(color="#E6E6E6", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=9)


def _label(group: dict[str, Any]) -> str:
    text = f"{group['tag']}  {group['label']}".replace("$", r"\$")
    return text if len(text) <= 100 else text[:99] + "…"
