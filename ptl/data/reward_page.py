"""How well a reward model orders answers, for people: tables in Markdown and a plot.

Eaten is a mapping from a name (a model, or a stage of a run) to measures as
``ptl.functional.ranking_measures.measures_of`` gives them. Every function is pure but ``draw``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
"""Okabe and Ito's colours, which people with any colour vision tell apart."""
MARKERS = "osX^DvPh"
COLUMNS = ("pairs", "accuracy", "best of K", "Kendall tau", "margin", "ECE", "mean", "deviation")
UNKNOWN = "–"
Measures = Mapping[str, Any]

METHOD = (
    "Accuracy is over pairs of answers that the ranking tells apart; equal scores count half.",
    "Kendall's tau-b is the mean over prompts. Margin is the score of the better answer less that of the worse.",
    "ECE is the expected calibration error: the mean over pairs of |accuracy - sigmoid(|difference|)|, in bins of it.",
    "Length is the difference in tokens, better answer less worse answer: a model that follows length is good on one "
    "side and bad on the other.",
)


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return UNKNOWN if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A share in percent, or a dash."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def cells(measures: Measures) -> list[str]:
    """The columns of ``COLUMNS``."""
    shares = [percent(measures.get(key)) for key in ("accuracy", "best_of_k")]
    numbers = [number(measures.get(key)) for key in ("tau", "margin", "ece", "reward_mean", "reward_std")]
    return [f"{measures['pairs']:,}" if measures.get("pairs") is not None else UNKNOWN, *shares, *numbers]


def table(entries: Mapping[str, Measures], first: str) -> list[str]:
    """Lines of a Markdown table, a row an entry; ``first`` heads the names. Columns that nobody knows are left out."""
    rows = [[name, *cells(measures)] for name, measures in entries.items()]
    kept = [0, *(i for i in range(1, 1 + len(COLUMNS)) if any(row[i] != UNKNOWN for row in rows))]
    return markdown_table([(first, *COLUMNS)[i] for i in kept], [[row[i] for i in kept] for row in rows])


def length_table(entries: Mapping[str, Measures], first: str) -> list[str]:
    """Lines of a Markdown table of accuracy by difference in length."""
    bins = next(iter(entries.values()))["by_length"]
    rows = [
        [name, *(f"{percent(slot['accuracy'])} of {slot['pairs']:,}" for slot in measures["by_length"])]
        for name, measures in entries.items()
    ]
    return markdown_table((first, *(slot["longer_by"] for slot in bins)), rows)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are numbers."""
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = [":---", *("---:" for _ in columns[1:])]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *safe)]


# ---- the plot ----


def draw(entries: Mapping[str, Measures], path: Path, title: str) -> None:
    """Writes a PNG: reliability on the left, accuracy by difference in length on the right, an entry a colour.

    An entry whose ``calibration`` is None, since its scores are no log-odds, has no line on the left.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    looks = {name: (COLORS[i % 8], MARKERS[i % 8]) for i, name in enumerate(entries)}
    _reliability(left, entries, looks)
    _by_length(right, entries, looks)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, format="png")


def _reliability(axis: Axes, entries: Mapping[str, Measures], looks: Mapping[str, tuple[str, str]]) -> None:
    axis.plot([0.5, 1], [0.5, 1], color="#BBBBBB", linewidth=1, linestyle="--", label="as sure as right")
    axis.legend(loc="lower right", frameon=False, fontsize=9)
    for name, measures in entries.items():
        filled = [slot for slot in measures.get("calibration") or () if slot["pairs"]]
        most = max((slot["pairs"] for slot in filled), default=1)
        color, marker = looks[name]
        xs, ys = ([slot[key] for slot in filled] for key in ("confidence", "accuracy"))
        axis.plot(xs, ys, color=color, linewidth=1.2, alpha=0.6)
        sizes = [16 + 110 * slot["pairs"] / most for slot in filled]
        axis.scatter(xs, ys, s=sizes, color=color, marker=marker, alpha=0.85, linewidths=0, clip_on=False)
    axis.set_xlim(0.5, 1.0)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("confidence, sigmoid(|difference of scores|)")
    axis.set_ylabel("pairs ordered right, share")
    axis.set_title("Reliability (size: pairs of the bin)", loc="left", fontsize=11)
    _plain(axis)


def _by_length(axis: Axes, entries: Mapping[str, Measures], looks: Mapping[str, tuple[str, str]]) -> None:
    bins = next(iter(entries.values()))["by_length"]
    width = 0.8 / len(entries)
    for place, (name, measures) in enumerate(entries.items()):
        at = [i - 0.4 + width * (place + 0.5) for i in range(len(bins))]
        values = [slot["accuracy"] or 0.0 for slot in measures["by_length"]]
        axis.bar(at, values, width=0.92 * width, color=looks[name][0], label=name)
    axis.axhline(0.5, color="#BBBBBB", linewidth=1, linestyle="--")
    # Models of one tokenizer share their pairs; the stages of a run do not.
    counts = [dict.fromkeys(f"{m['by_length'][i]['pairs']:,}" for m in entries.values()) for i in range(len(bins))]
    labels = ["\n".join([slot["longer_by"], *(f"{n} pairs" for n in count)]) for slot, count in zip(bins, counts)]
    axis.set_xticks(range(len(bins)), labels)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("tokens by which the better answer is longer")
    axis.set_ylabel("pairs ordered right, share")
    axis.set_title("Accuracy by length", loc="left", fontsize=11)
    _plain(axis)


def _plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=9)
