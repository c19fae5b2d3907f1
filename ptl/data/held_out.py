"""Which rows are held out for validation."""

from __future__ import annotations

import numpy as np

from ptl.data.order import scramble
from ptl.data.units import Table, chunks

_KEY = np.uint64(0x5EED0F0A11D)
_HASH_BITS = 53


class HeldOut:
    """Which rows are held out for validation: those of a fixed share of the conversations, the same in every run.

    The choice is a hash of a conversation's source and line, so all documents of a conversation fall on one side, and
    rows that are added later move no other row. At least one conversation is held out.

    Args:
        table: the prepared rows, with a column ``line``.
        fraction: share of the conversations, in (0, 1).

    Raises:
        ValueError: no row would be left to train on.
    """

    def __init__(self, table: Table, fraction: float) -> None:
        self._lines = table.rows.select_columns(["line"]).with_format("arrow")
        self._sources = table.source_ids
        self._limit = int(fraction * 2**_HASH_BITS)
        least, chosen, count = 2**_HASH_BITS, 0, len(table.lengths)
        for begin, end in chunks(count):
            hashes = self._hashes(begin, end)
            least = min(least, int(hashes.min()))
            chosen += int((hashes < self._limit).sum())
        if chosen == 0:
            self._limit = least + 1
            chosen = sum(int(self(begin, end).sum()) for begin, end in chunks(count))
        if chosen == count:
            raise ValueError(
                f"data.val_fraction {fraction} of {count} rows leaves none to train on: lower it, or give data.val"
            )

    def __call__(self, begin: int, end: int) -> np.ndarray:
        """Mask of the rows from ``begin`` to ``end``."""
        return self._hashes(begin, end) < self._limit

    def _hashes(self, begin: int, end: int) -> np.ndarray:
        lines = self._lines[begin:end]["line"].to_numpy().astype(np.uint64)
        sources = np.asarray(self._sources[begin:end]).astype(np.uint64)
        return scramble(lines ^ (sources << np.uint64(48)), _KEY, _HASH_BITS)
