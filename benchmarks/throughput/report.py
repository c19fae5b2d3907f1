"""Recorded cells as tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import table
from benchmarks.throughput.cells import Cell

COLUMNS = (
    "objective", "variant", "strategy", "ranks", "sequence", "micro_batch", "outcome", "step s", "p90 s", "of DDP",
    "tokens/s", "trained/s", "padding", "of matmul", "MFU", "GiB a rank",
)  # fmt: skip
Line = Mapping[str, Any]


def cell_of(line: Line) -> Cell:
    """The cell that a line is of."""
    return Cell(**{name: line[name] for name in Cell.__dataclass_fields__ if name in line})


def newest(lines: Sequence[Line]) -> list[Line]:
    """The last line of each cell, model and device."""
    found: dict[Any, Line] = {}
    for line in lines:
        key = (cell_of(line), line.get("model"), line.get("device"))
        found.pop(key, None)
        found[key] = line
    return list(found.values())


def over_ddp(lines: Sequence[Line]) -> dict[int, float]:
    """Step time over that of the DDP cell that is equal but for the strategy, by the line's index."""
    base = {_comparable(line): line["step_seconds_median"] for line in lines if _is(line, "ddp")}
    return {
        index: line["step_seconds_median"] / base[_comparable(line)]
        for index, line in enumerate(lines)
        if line["outcome"] == "ok" and _comparable(line) in base
    }


def _is(line: Line, strategy: str) -> bool:
    return line["strategy"] == strategy and line["outcome"] == "ok"


def _comparable(line: Line) -> Any:
    return cell_of(line).key, line.get("model"), line.get("device")


def rendered(lines: Sequence[Line]) -> str:
    """The newest line of each cell as a Markdown table."""
    lines = newest(lines)
    ratios = over_ddp(lines)
    rows = [
        {
            **line,
            "step s": _number(line.get("step_seconds_median"), "{:.3f}"),
            "p90 s": _number(line.get("step_seconds_p90"), "{:.3f}"),
            "of DDP": _number(ratios.get(index), "{:.2f}"),
            "tokens/s": _number(line.get("tokens_per_second"), "{:,.0f}"),
            "trained/s": _number(line.get("trained_tokens_per_second"), "{:,.0f}"),
            "padding": _number(line.get("padding_fraction"), "{:.1%}"),
            "of matmul": _number(line.get("share_of_matmul"), "{:.0%}"),
            "MFU": _number(line.get("mfu"), "{:.1%}"),
            "GiB a rank": _number(line.get("peak_memory_gib"), "{:.2f}"),
        }
        for index, line in enumerate(lines)
    ]
    return table(rows, COLUMNS)


def _number(value: Any, form: str) -> str | None:
    return None if value is None else form.format(value)


def plot(lines: Sequence[Line], path: Path) -> None:
    """Tokens a second and memory of each cell as bars, in one PNG; what failed is an empty bar with its reason."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = newest(lines)
    labels = [
        f"{line['objective']} {line['variant']} {line['strategy']} {line['ranks']}x{line['nodes']} {line['sequence']}"
        for line in lines
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1 + 0.35 * len(lines)), sharey=True, layout="constrained")
    columns = (("tokens_per_second", "tokens a second"), ("peak_memory_gib", "GiB of the fullest rank"))
    for axis, (name, title) in zip(axes, columns):
        values = [line.get(name) or 0.0 for line in lines]
        axis.barh(range(len(lines)), values, color=["C0" if line["variant"][0] == "f" else "C1" for line in lines])
        for row, line in enumerate(lines):
            text = f" {values[row]:,.4g}" if line["outcome"] == "ok" else f" {line['outcome']}"
            axis.text(values[row], row, text, va="center", fontsize=8)
        axis.set_title(title)
        axis.margins(x=0.15)
    axes[0].set_yticks(range(len(lines)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
