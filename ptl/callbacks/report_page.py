"""A distillation report for people: tables and a plot out of ``distill_report.json``, and nothing else.

The report is a dict of JSON values; ``distill_report`` says what is in it. Every function here is pure but ``draw``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

COLORS = ("#0072B2", "#999999", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which people with any colour vision tell apart, and black."""
MARKERS = "sXo^DvPh"
"""Drawn hollow, so that one shows through another."""
INK = "#333333"
COLUMNS = (
    "model",
    "KL to teacher (nats)",
    "gap closed",
    "perplexity",
    "top-1 agreement",
    "task accuracy",
    "parameters",
    "weights (MB)",
    "tokens/s",
)
UNKNOWN = "–"
Report = dict[str, Any]


# ---- numbers as text ----


def number(value: Any, digits: int = 3) -> str:
    """A number with about so many significant digits, a dash for none; strings (``inf``) as they are."""
    if value is None or isinstance(value, str):
        return UNKNOWN if value is None else value
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def percent(value: Any) -> str:
    """A share in percent; a dash for none."""
    return UNKNOWN if value is None or isinstance(value, str) else f"{100 * value:.1f} %"


def cells(report: Report, part: str) -> list[list[str]]:
    """A row of text for each model, with the columns of ``COLUMNS``, measured on ``special`` or ``general`` rows."""
    return [_cells(model, model["parts"][part]["all"]) for model in report["models"] if part in model["parts"]]


def _cells(model: Report, measures: Report) -> list[str]:
    asked = measures.get("questions")
    accuracy = percent(measures.get("accuracy")) + (f" of {asked}" if asked else "")
    return [
        model["name"],
        number(measures["kl"]),
        percent(measures.get("gap_closed")),
        number(measures["perplexity"]),
        percent(measures["agreement"]),
        accuracy,
        f"{model['parameters']:,}",
        number(model["bytes"] / 1e6),
        number(model["tokens_per_second"]),
    ]


def parts_of(report: Report) -> list[str]:
    """``special``, and ``general`` where it was measured."""
    return list(report["rows"])


# ---- pages ----


def markdown(report: Report) -> str:
    """The report as a page of Markdown."""
    lines = [f"# Distillation report, step {report['step']}", ""]
    lines += [headline, ""] if (headline := gap_line(report)) else []
    for part in parts_of(report):
        rows = report["rows"][part]
        lines += [f"## Held-out rows, {part}", ""]
        lines += [
            f"{rows['measured']:,} of {rows['held_out']:,} {rows['unit']}, from {', '.join(rows['sources'])}.",
            "",
        ]
        lines += [*_table(COLUMNS, cells(report, part)), ""]
        if len(rows["sources"]) > 1:
            lines += [f"### By source, {part}", "", *_table(*_by_source(report, part)), ""]
    lines += ["## How it was measured", "", *(f"- {note}" for note in [*report["method"], *report["notes"]]), ""]
    return "\n".join(lines)


def gap_line(report: Report) -> str | None:
    """The sentence that sums the run up, or None where there is no teacher or no student before to compare with."""
    found = _gaps(report)
    return f"Gap to the teacher closed: {'; '.join(found)}." if found else None


def _gaps(report: Report) -> list[str]:
    models = {model["name"]: model for model in report["models"]}
    found = []
    for part in parts_of(report):
        before, after = (models.get(name, {}).get("parts", {}).get(part, {}).get("all") for name in ("before", "after"))
        if before and after and after.get("gap_closed") is not None:
            found.append(
                f"{percent(after['gap_closed'])} on {part} rows "
                f"(token KL {number(before['kl'])} before, {number(after['kl'])} after, in nats)"
            )
    return found


def _by_source(report: Report, part: str) -> tuple[Sequence[str], list[list[str]]]:
    table = [
        [source, *_cells(model, measures)[:6]]
        for source in report["rows"][part]["sources"]
        for model in report["models"]
        if part in model["parts"] and (measures := model["parts"][part]["sources"].get(source))
    ]
    return ("source", *COLUMNS[:6]), table


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = [":---" if i == 0 or name == "model" else "---:" for i, name in enumerate(columns)]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *safe)]


def rich_table(report: Report, part: str) -> Table:
    """One part's table for the terminal."""
    table = Table(title=f"distillation report, {part} rows, step {report['step']}", title_justify="left")
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left")
    for row in cells(report, part):
        table.add_row(*row)
    return table


# ---- the plot ----


def draw(report: Report, path: Path) -> None:
    """Writes the plot as PNG: KL by model for each part, and KL against the size and the speed of the models.

    Without a teacher to compare with, perplexity takes the place of KL.
    """
    models, parts = report["models"], parts_of(report)
    looks = {model["name"]: (COLORS[i % 8], MARKERS[i % 8]) for i, model in enumerate(models)}
    has_kl = any(_value(model, parts[0], "kl") is not None for model in models)
    key, label = ("kl", "token KL to the teacher, nats") if has_kl else ("perplexity", "perplexity")
    costs = [("bytes", 1e6, "weights, MB")]
    if any(model["tokens_per_second"] for model in models):
        costs.append(("tokens_per_second", 1.0, "greedy generation, tokens/s"))
    figure = Figure(figsize=(11, 4.5 + 0.42 * len(models)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[0.9 + 0.42 * len(models), 3.0])
    tops, bottoms = halves
    axes = tops.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=True):
        _bars(axis, [(m["name"], _value(m, part, key)) for m in models], looks, f"Held-out rows: {part}", label)
    axes = bottoms.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axis, (cost, unit, cost_label) in zip(axes, costs, strict=True):
        points = [(m["name"], m[cost] and m[cost] / unit, _value(m, parts[0], key)) for m in models]
        _points(axis, points, looks, cost_label)
    axes[0].set_ylabel(label.replace(" to the teacher", ""))
    axes[0].set_title(f"Quality against size, {parts[0]} rows", loc="left", fontsize=11)
    if len(axes) > 1:
        axes[1].set_title(f"Quality against speed, {parts[0]} rows", loc="left", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    bottoms.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9)
    title = [f"Distillation, step {report['step']}", *(f"Gap to the teacher closed: {gap}" for gap in _gaps(report))]
    figure.suptitle("\n".join(title), fontsize=11, x=0.01, ha="left")
    figure.savefig(path, format="png")


def _value(model: Report, part: str, key: str) -> float | None:
    """A number that can be drawn, or None."""
    value = model["parts"].get(part, {}).get("all", {}).get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _bars(axis: Axes, bars: list[tuple[str, float | None]], looks: Report, title: str, label: str) -> None:
    names = [name for name, _ in bars]
    widths = [value or 0.0 for _, value in bars]
    axis.barh(range(len(bars)), widths, color=[looks[name][0] for name in names], height=0.65)
    for at, (_, value) in enumerate(bars):
        axis.annotate(number(value), (value or 0.0, at), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), names)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_xlim(0, 1.15 * max(widths) or 1)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(label)
    axis.tick_params(axis="y", length=0)
    _plain(axis)


def _points(axis: Axes, points: list[tuple[str, Any, float | None]], looks: Report, label: str) -> None:
    for name, cost, value in points:
        if cost and value is not None:
            color, marker = looks[name]
            axis.plot([cost], [value], marker, mec=color, mfc="none", ms=9, mew=2, label=name, clip_on=False)
    axis.set_xlabel(label)
    axis.set_xlim(0, 1.1 * max((cost for _, cost, _ in points if cost), default=1))
    axis.set_ylim(0, 1.15 * max((value for *_, value in points if value), default=1))
    axis.grid(color="#E6E6E6", linewidth=0.7)
    axis.set_axisbelow(True)
    _plain(axis)


def _plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(INK)
    axis.tick_params(colors=INK, labelsize=9)
