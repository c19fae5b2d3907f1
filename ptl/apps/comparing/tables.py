"""A comparison as tables: for the terminal, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptl.apps.comparing.configs import text_of
from ptl.apps.comparing.folders import SHARED_FACTS
from ptl.apps.comparing.summary import Comparison, short_keys, value_text

if TYPE_CHECKING:
    from rich.table import Table as RichTable

UNKNOWN = "–"
FOLDED = 20
"""Characters that a column of a terminal's table has at least where its cells are longer."""
FACT_TITLES = {"tokens_per_second_per_device": "tokens/s/device", "mfu": "MFU", "peak_memory_gib": "memory GiB"}
METHOD = (
    "A group holds the runs whose configurations differ in seeds alone. ± is the standard deviation over its runs "
    "(n - 1); n is given where it is not the number of runs that ended.",
    "Runs that failed or are not at their end are in the table of runs, and out of a group's means as soon as one of "
    "its runs ended (finished or stopped by itself).",
    "Final is the last value that was logged, best the lowest or highest over all points where the metric's name says "
    "which is better. Rows that a resumed attempt wrote again count once.",
    "Device-hours are the wall time of all attempts times devices: GPU-hours where the devices are GPUs. A group's are "
    "the sum over all of its runs, failed ones among them.",
)


@dataclass(frozen=True)
class Table:
    """Titles, rows of text of that many cells, and how many first columns are words."""

    titles: list[str]
    rows: list[list[str]]
    words: int


# ---- numbers as text ----


def number(value: Any) -> str:
    """Four significant digits; a dash for None; ``nan`` and ``inf`` as they are."""
    if value is None:
        return UNKNOWN
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        size = 0 if value == 0 else math.floor(math.log10(abs(value)))
        return f"{value:,.{min(max(0, 3 - size), 6)}f}"
    return f"{value:.3e}"


def spread_text(found: dict[str, Any] | None, complete: int) -> str:
    """``1.234 ± 0.012``, with n where it is not ``complete``."""
    if not found or found["mean"] is None:
        return UNKNOWN
    text = number(found["mean"]) if found["deviation"] is None else with_deviation(found["mean"], found["deviation"])
    return text if found["n"] == complete else f"{text} (n={found['n']})"


def with_deviation(mean: float, deviation: float) -> str:
    """Both with as many decimals as two digits of the deviation have, so that they can be read beside each other."""
    if not 1e-6 <= deviation < 1e7 or abs(mean) >= 1e7:
        return f"{number(mean)} ± {number(deviation)}"
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:,.{decimals}f} ± {deviation:,.{decimals}f}"


def status_text(counts: dict[str, int]) -> str:
    """``2 finished, 1 failed``."""
    return ", ".join(f"{count} {status}" for status, count in counts.items())


# ---- tables ----


def group_table(comparison: Comparison) -> Table:
    """A row a group: what differs, how its runs ended, metrics, throughput, memory, cost."""
    keys, shown = short_keys(comparison["keys"]), comparison["shown"]
    best = [name for name in shown if comparison["metrics"][name]]
    titles = ["group", *keys.values(), "runs"]
    for name in shown:
        titles += [f"{name} final", *([f"{name} best"] if name in best else [])]
    titles += [*FACT_TITLES.values(), "device-hours", *(["cost"] if comparison["priced"] else [])]
    rows = []
    for group in comparison["groups"]:
        n = group["complete"] or sum(group["status"].values())
        row = [group["tag"], *(value_text(group["config"], key) for key in keys), status_text(group["status"])]
        for name in shown:
            found = group["metrics"].get(name, {})
            row += [spread_text(found.get(which), n) for which in ("final", *(["best"] if name in best else []))]
        row += [spread_text(group["facts"][fact], n) if group["facts"][fact]["n"] else UNKNOWN for fact in FACT_TITLES]
        row += [number(group["device_hours"]), *([number(group["cost"])] if comparison["priced"] else [])]
        rows.append(row)
    return _without_empty(Table(titles, rows, 2 + len(keys)))


def run_table(comparison: Comparison) -> Table:
    """A row a run, in the order of the groups."""
    shown, seeds = comparison["shown"], short_keys(comparison["seeds"])
    best = [name for name in shown if comparison["metrics"][name]]
    titles = ["run", "group", *seeds.values(), "status", "error", "attempts", "step"]
    for name in shown:
        titles += [f"{name} final", *([f"{name} best"] if name in best else [])]
    titles += [*FACT_TITLES.values(), "device-hours", *(["cost"] if comparison["priced"] else [])]
    rows = []
    for run in ordered_runs(comparison):
        row = [run["name"], run["group"], *(value_text(run["seeds"], key) for key in seeds), run["status"]]
        row += [_short(run["error"]), _plain(run["attempts"]), _plain(run["step"])]
        for name in shown:
            found = run["metrics"].get(name, {})
            row += [number(found.get(which)) for which in ("final", *(["best"] if name in best else []))]
        row += [number(run["facts"].get(fact)) for fact in (*FACT_TITLES, "device_hours")]
        rows.append([*row, *([number(run["cost"])] if comparison["priced"] else [])])
    return _without_empty(Table(titles, rows, 4 + len(seeds)))


def ordered_runs(comparison: Comparison) -> list[dict[str, Any]]:
    """The runs, group after group."""
    return [comparison["runs"][i] for group in comparison["groups"] for i in group["runs"]]


def _without_empty(table: Table) -> Table:
    """The table without columns that nobody knows; the first always stays."""
    kept = [i for i in range(len(table.titles)) if not i or any(row[i] != UNKNOWN for row in table.rows)]
    return Table(
        [table.titles[i] for i in kept],
        [[row[i] for i in kept] for row in table.rows],
        sum(i < table.words for i in kept),
    )


def _plain(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _short(text: str | None, most: int = 80) -> str:
    line = " ".join((text or UNKNOWN).split())
    return line if len(line) <= most else line[: most - 1] + "…"


# ---- pages ----


def headline(comparison: Comparison) -> str:
    """``6 runs in 2 groups``."""
    runs, groups = len(comparison["runs"]), len(comparison["groups"])
    return f"{runs:,} run{'s' * (runs != 1)} in {groups:,} group{'s' * (groups != 1)}"


def markdown(comparison: Comparison, image: str | None = None) -> str:
    """The comparison as a page of Markdown; ``image`` is the name of the curves beside it."""
    lines = [
        f"# Comparison of {headline(comparison)}",
        "",
        "## Groups",
        "",
        *markdown_table(group_table(comparison)),
        "",
    ]
    lines += [f"![Learning curves]({image})", ""] if image else []
    lines += ["## Runs", "", *markdown_table(run_table(comparison)), "", "## How to read it", ""]
    lines += [f"- {note}" for note in (*METHOD, *comparison["notes"])]
    return "\n".join([*lines, ""])


def markdown_table(table: Table) -> list[str]:
    """The lines of a table in Markdown."""
    rule = [":---" if i < table.words else "---:" for i in range(len(table.titles))]
    rows = ([_cell(cell) for cell in row] for row in (table.titles, *table.rows))
    first, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [first, f"| {' | '.join(rule)} |", *rest]


def _cell(text: str) -> str:
    for raw, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", " ")):
        text = text.replace(raw, safe)
    return text


def fitting(table: Table, width: int) -> tuple[Table, int]:
    """The table without the columns that a terminal of so many characters has no room for, and how many those are.

    The group, how its runs ended and the first metric stay. Of the rest, metrics go first, from the last one on, then
    facts, then what differs, of which a column may be folded to ``FOLDED`` characters.
    """
    sizes = [max(map(len, cells)) + 3 for cells in zip(table.titles, *table.rows, strict=True)]
    differing = range(1, table.words - 1)
    sizes = [min(size, FOLDED + 3) if i in differing else size for i, size in enumerate(sizes)]
    metric = [i for i in range(table.words, len(sizes)) if table.titles[i].endswith((" final", " best"))]
    first = metric[: 1 + any(table.titles[i] == table.titles[metric[0]][:-5] + "best" for i in metric[1:2])]
    other = [i for i in range(table.words, len(sizes)) if i not in metric]
    kept = {0, table.words - 1, *first}
    for i in [*differing, *other, *metric]:
        if 1 + sum(sizes[j] for j in kept | {i}) <= width:
            kept.add(i)
    chosen = sorted(kept)
    rows = [[row[i] for i in chosen] for row in table.rows]
    words = sum(i < table.words for i in chosen)
    return Table([table.titles[i] for i in chosen], rows, words), len(sizes) - len(chosen)


def rich_table(comparison: Comparison, width: int) -> RichTable:
    """The groups for a terminal of ``width`` characters."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table, left_out = fitting(group_table(comparison), width)
    more = f"{left_out} more columns with --out FOLDER or --markdown" if left_out else None
    out = RichTable(title=headline(comparison), title_justify="left", caption=more, caption_justify="left")
    for i, title in enumerate(table.titles):
        folds = 0 < i < table.words - 1
        out.add_column(Text(title), justify="left" if i < table.words else "right", overflow="fold", no_wrap=not folds)
    for row in table.rows:
        out.add_row(*map(Text, row))
    return out


def csv_text(comparison: Comparison) -> str:
    """A line a run with every metric in full digits; a group's means are in the JSON."""
    names = list(comparison["metrics"])
    columns = ["run", "group", "status", "error", "attempts", "devices", "step", "source", "where"]
    parts = ("final", "final_step", "best", "best_step", "low", "high", "points")
    titles = [*columns, *comparison["keys"], *comparison["seeds"], *SHARED_FACTS, "device_hours", "cost"]
    titles += [f"{name} {part}" for name in names for part in parts]
    configs = {group["tag"]: group["config"] for group in comparison["groups"]}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(titles)
    for run in ordered_runs(comparison):
        row: list[Any] = [run["name"], *(run[column] for column in columns[1:])]
        row += [value_text(configs[run["group"]], key) for key in comparison["keys"]]
        row += [text_of(run["seeds"][key]) if key in run["seeds"] else None for key in comparison["seeds"]]
        row += [run["facts"].get(fact) for fact in (*SHARED_FACTS, "device_hours")] + [run["cost"]]
        row += [run["metrics"].get(name, {}).get(part) for name in names for part in parts]
        writer.writerow("" if value in (None, UNKNOWN) else value for value in row)
    return out.getvalue()


def json_text(comparison: Comparison) -> str:
    """The comparison as JSON, with numbers that JSON lacks as strings."""
    return json.dumps(json_ready(comparison), ensure_ascii=False, default=str, allow_nan=False)


def json_ready(tree: Any) -> Any:
    """``inf`` and ``nan`` as strings, everywhere in a tree."""
    if isinstance(tree, dict):
        return {str(key): json_ready(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [json_ready(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree
