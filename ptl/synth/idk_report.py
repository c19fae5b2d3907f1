"""What models answer and refuse of held-out questions: measures, a page of Markdown and a plot.

Known and unknown are what the base model's own answers made them when the questions were graded. Every function is pure
but ``write_report`` and ``draw``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptl.data.durable import write_text
from ptl.data.mapped import published
from ptl.data.reward_page import COLORS, UNKNOWN, markdown_table
from ptl.functional.intervals import wilson

Row = Mapping[str, Any]
DECISIONS = ("known", "between", "unknown")
SHOWN = 4
"""Questions of each decision whose answers stand on the page."""
LONGEST = 200
MEASURES: Mapping[str, str] = {
    "answered": "answered",
    "right_when_answered": "right when answered",
    "right_on_known": "right on known",
    "wrong_refusals": "wrong refusals (of known)",
    "right_refusals": "refusals on unknown",
}
"""Names of the measures of one part, and their titles."""
METHOD = (
    "Each model answers every question once, greedily. An answer that says that it does not know and gives none after "
    "all is a refusal; all else is answered, and right where it matches an accepted answer.",
    "Known, between and unknown are by the answers of the base model that the questions were graded with, several for "
    "each, drawn with a temperature: its one greedy answer may differ.",
    "In brackets: 95 % intervals by Wilson of a share that was counted once; they say nothing of other kinds of "
    "questions, nor of other seeds of training.",
)


def measure(answers: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """The measures of each model, of all questions and by source.

    Args:
        answers: model -> rows as ``grade_all`` writes them, of one answer each, with the ``decision`` of the question.

    Raises:
        ValueError: a model that was asked other questions than the first.
    """
    asked = {name: [row["number"] for row in rows] for name, rows in answers.items()}
    first = next(iter(asked))
    for name, numbers in asked.items():
        if numbers != asked[first]:
            raise ValueError(
                f"{name} was asked others ({len(numbers)}) than {first} ({len(asked[first])}): their templates or "
                "context lengths differ; compare models of one kind"
            )
    sources = sorted({row["source"] for row in answers[first]})
    models = [
        {
            "name": name,
            "model": rows[0]["model"],
            "all": part_of(rows),
            "by_source": {source: part_of(row for row in rows if row["source"] == source) for source in sources},
        }
        for name, rows in answers.items()
    ]
    return {"models": models, "method": list(METHOD)}


def part_of(rows: Iterable[Row]) -> dict[str, Any]:
    """The measures of some questions: how many of each decision, and the shares of ``MEASURES``."""
    rows = list(rows)
    by = {decision: [row for row in rows if row["decision"] == decision] for decision in DECISIONS}
    answered = [row for row in rows if not _refused(row)]
    return {
        "questions": {"all": len(rows), **{decision: len(part) for decision, part in by.items()}},
        "answered": share(len(answered), len(rows)),
        "right_when_answered": share(sum(map(_right, answered)), len(answered)),
        "right_on_known": share(sum(map(_right, by["known"])), len(by["known"])),
        "wrong_refusals": share(sum(map(_refused, by["known"])), len(by["known"])),
        "right_refusals": share(sum(map(_refused, by["unknown"])), len(by["unknown"])),
    }


def share(count: int, total: int) -> dict[str, Any]:
    """A share with its interval; the share is None of nothing."""
    low, high = wilson(count, total)
    return {"count": count, "of": total, "share": count / total if total else None, "low": low, "high": high}


def _refused(row: Row) -> bool:
    return bool(row["samples"][0]["refused"])


def _right(row: Row) -> bool:
    return bool(row["samples"][0]["right"])


# ---- pages ----


def write_report(report: Mapping[str, Any], answers: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Writes ``report.json``, ``report.md`` and ``report.png``, each whole or not at all."""
    write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "report.md", markdown(report, answers))
    with published(folder / "report.png") as partial:
        draw(report, partial)


def markdown(report: Mapping[str, Any], answers: Mapping[str, Sequence[Row]]) -> str:
    """The report as a page."""
    columns = ("model", *MEASURES.values())
    models = report["models"]
    count = models[0]["all"]["questions"]
    lines = ["# Known and unknown, held-out questions", ""]
    lines += [f"{count['all']:,} questions: {', '.join(f'{count[name]:,} {name}' for name in DECISIONS)}.", ""]
    lines += [*markdown_table(columns, [[model["name"], *_cells(model["all"])] for model in models]), ""]
    for source in models[0]["by_source"] if len(models[0]["by_source"]) > 1 else ():
        count = models[0]["by_source"][source]["questions"]
        lines += [f"## {source}", ""]
        lines += [f"{count['all']:,} questions: {', '.join(f'{count[name]:,} {name}' for name in DECISIONS)}.", ""]
        rows = [[model["name"], *_cells(model["by_source"][source])] for model in models]
        lines += [*markdown_table(columns, rows), ""]
    lines += ["## Some answers", "", *_examples(answers), ""]
    return "\n".join([*lines, "## How it was measured", "", *(f"- {line}" for line in report["method"]), ""])


def _cells(part: Mapping[str, Any]) -> list[str]:
    return [_cell(part[name]) for name in MEASURES]


def _cell(value: Mapping[str, Any]) -> str:
    if value["share"] is None:
        return UNKNOWN
    return f"{value['share']:.1%} of {value['of']:,} [{value['low']:.1%}, {value['high']:.1%}]"


def _examples(answers: Mapping[str, Sequence[Row]]) -> list[str]:
    """The first questions of each decision with every model's answer."""
    rows: list[list[str]] = []
    first = next(iter(answers.values()))
    for decision in DECISIONS:
        places = [place for place, row in enumerate(first) if row["decision"] == decision]
        for place in places[:: max(1, len(places) // SHOWN)][:SHOWN]:
            asked = first[place]["prompt"][-1]["content"]
            said = [each[place]["samples"][0]["text"] for each in answers.values()]
            rows.append([_short(text) for text in (decision, asked, "; ".join(first[place]["answers"]), *said)])
    return markdown_table(("base", "question", "accepted", *answers), rows)


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("<", "&lt;")
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: for each measure a bar for each model, with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = report["models"]
    figure = Figure(figsize=(10, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        at = [place + (i - (len(models) - 1) / 2) * width for place in range(len(MEASURES))]
        parts = [model["all"][name] for name in MEASURES]
        heights = [part["share"] or 0.0 for part in parts]
        errors = [
            [height - min(height, part["low"]) if part["of"] else 0 for height, part in zip(heights, parts)],
            [max(height, part["high"]) - height if part["of"] else 0 for height, part in zip(heights, parts)],
        ]
        axis.bar(at, heights, 0.9 * width, color=COLORS[i % 8], label=model["name"], yerr=errors, capsize=3)
    axis.set_xticks(range(len(MEASURES)), [title.replace(" (", "\n(") for title in MEASURES.values()])
    axis.set(ylim=(0, 1.05), ylabel="share")
    axis.set_title("Held-out questions, with 95 % intervals", loc="left", fontsize=11)
    axis.grid(axis="y", color="#E6E6E6", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(models), 4), frameon=False, fontsize=9)
    figure.savefig(path, format="png")
