"""One file that several processes write together: a part each, joined in order once nothing is missing.

A part is a run of batches. A batch is a line for each row, then one line that says what became of each of its items::

    {"id": "0-1f2e...", ...}
    {"batch": [{"number": 0, "key": "1f2e...", "reason": null, ...}, {"number": 7, ..., "reason": "too_long"}]}

Rows without that line after them are of a batch that was cut off by a kill; they do not count and are written again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptl.data.mapped import published

_BATCH = b'{"batch": '


class Done(NamedTuple):
    """What became of an item.

    Attributes:
        number: of the item.
        entry: as it was given to ``Shares.append``.
        part, begin, size: where its row is, in bytes; size 0 for an item without one.
    """

    number: int
    entry: dict[str, Any]
    part: Path
    begin: int
    size: int


class Shares:
    """The parts of a file; this process writes one and reads all.

    Arguments:
        path: the file that they become.
        rank: of this process.

    Raises:
        ValueError: a part is not one.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.own = path.with_name(f"{path.name}.part-{rank}")
        if self.own.exists():
            _, whole = _read(self.own)
            os.truncate(self.own, whole)

    def done(self) -> dict[int, Done]:
        """What is done, by any process, by the number of the item. Of items done twice, the one of the lower part."""
        found: dict[int, Done] = {}
        parts = self.path.parent.glob(f"{self.path.name}.part-*")
        for part in sorted(parts, key=lambda part: (len(part.name), part.name)):
            for done in _read(part)[0]:
                found.setdefault(done.number, done)
        return found

    def append(self, rows: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]) -> None:
        """Adds a batch to this process's part and waits until it is on disk.

        Args:
            rows: of the entries whose ``reason`` is None, in their order; their first key is not ``batch``.
            entries: ``number`` and ``reason`` of each item, and what else is to be kept of it.
        """
        lines = [*rows, {"batch": list(entries)}]
        with self.own.open("ab") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def join(self, numbers: Iterable[int]) -> list[Done] | None:
        """Writes the file, whole or not at all: the rows of these items, in this order.

        Any number of processes may do so at the same time: they write the same.

        Returns:
            What became of each item, or None where some are not done yet; then nothing is written.
        """
        found = self.done()
        wanted = [found.get(number) for number in numbers]
        items = [done for done in wanted if done is not None]
        if len(items) < len(wanted):
            return None
        handles = {part: part.open("rb") for part in {done.part for done in items}}
        try:
            with published(self.path) as partial, partial.open("wb") as file:
                for done in items:
                    handles[done.part].seek(done.begin)
                    file.write(handles[done.part].read(done.size))
        finally:
            for handle in handles.values():
                handle.close()
        return items


def _read(part: Path) -> tuple[list[Done], int]:
    """What is done in a part, and how many of its bytes are whole batches."""
    found: list[Done] = []
    rows: list[tuple[int, int]] = []
    position = whole = 0
    with part.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if not line.startswith(_BATCH):
                rows.append((position, len(line)))
                position += len(line)
                continue
            position += len(line)
            try:
                entries = json.loads(line)["batch"]
                spans = iter(rows)
                for entry in entries:
                    found.append(
                        Done(entry["number"], entry, part, *(next(spans) if entry["reason"] is None else (0, 0)))
                    )
                if next(spans, None) is not None:
                    raise ValueError("more rows than it names")
            except (ValueError, KeyError, TypeError, StopIteration) as error:
                raise ValueError(f"{part}: it has a broken batch ({error!r}): delete this part") from error
            rows, whole = [], position
    return found, whole
