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


def main(names: Sequence[str], folder: Path = RESULTS) -> None:
    """Prints the results of the named benchmarks, or of all."""
    chosen = names or sorted(path.stem for path in folder.glob("*.json"))
    print(table([line for name in chosen for line in read(name, folder)]))


if __name__ == "__main__":
    main(sys.argv[1:])
