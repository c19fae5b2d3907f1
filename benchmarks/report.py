"""The recorded results as a Markdown table: ``python -m benchmarks.report [NAME ...]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, read

COLUMNS = ("benchmark", "stage", "variant", "device", "peer", "ratio", "memory_ratio", "pairs", "date")


def table(lines: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """A row a line; a key that a line lacks is an empty cell."""
    rows = [columns, ["---"] * len(columns), *([_cell(line.get(name)) for name in columns] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


PEER_COLUMNS = (
    "stage", "variant", "model", "peer", "useful tokens/s", "of matmul", "ratio", "memory_ratio", "pairs",
    "loss difference", "device", "date",
)  # fmt: skip


def peers(folder: Path = RESULTS) -> str:
    """Every comparison with another library as one table, ours before theirs, by stage and date."""
    lines = [line for path in sorted(folder.glob("peers_*.json")) for line in read(path.stem, folder)]
    rows = [
        {
            **line,
            "useful tokens/s": _both(line.get("useful_tokens_per_second"), "{:,.0f}"),
            "of matmul": _both(line.get("share_of_matmul"), "{:.0%}"),
            "loss difference": (line.get("losses") or {}).get("largest_difference"),
            "date": str(line["date"])[:10],
        }
        for line in sorted(lines, key=lambda line: (line["stage"], line["date"]))
    ]
    return table(rows, PEER_COLUMNS)


def _both(sides: Mapping[str, float] | None, form: str) -> str | None:
    return None if sides is None else f"{form.format(sides['ptl'])} / {form.format(sides['peer'])}"


def main(names: Sequence[str], folder: Path = RESULTS) -> None:
    """Prints the results of the named benchmarks, or of all."""
    chosen = names or sorted(path.stem for path in folder.glob("*.json"))
    print(table([line for name in chosen for line in read(name, folder)]))


if __name__ == "__main__":
    main(sys.argv[1:])
