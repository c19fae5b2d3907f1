"""Files of lines that grow while a model writes: begun with settings that stay, whole after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptl.data.mapped import published


def settle(path: Path, settings: Any) -> None:
    """Writes the settings, a dataclass, beside a new file; refuses to go on with a file that was begun with others.

    ``batch_tokens`` may change: it moves the last bits of the numbers and is what to lower when memory runs out.

    Raises:
        ValueError: other settings, or a file that has none beside it.
    """
    beside = path.with_name(path.name + ".settings.json")
    wanted = asdict(settings)
    if beside.is_file():
        found = json.loads(beside.read_text(encoding="utf-8"))
        names = [name for name in wanted if name != "batch_tokens" and found.get(name) != wanted[name]]
        if names:
            told = "; ".join(f"{name} {found.get(name)} against {wanted[name]}" for name in names)
            raise ValueError(f"{path} was begun with other settings ({told}): give another file, or delete {path}*")
    elif path.exists():
        raise ValueError(f"{path} is there and was not begun by this command: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(beside) as partial:
        partial.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def whole_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Number and reason of each row of a .jsonl file, after a torn last line has been cut off; none without a file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        file.truncate(whole)
        os.fsync(file.fileno())
        file.seek(0)
        for count, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                yield entry["number"], entry.get("reason")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{count}: no row of answers ({error}): give another file") from error


def append_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a .jsonl file and waits until they are on disk."""
    if not rows:
        return
    with path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
