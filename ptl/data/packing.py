"""Best-fit packing of documents into units of at most so many tokens, on the histogram of their lengths.

The decisions depend on how many rows have each length, not on the rows (longest-pack-first histogram packing: Krell et
al. 2021, "Efficient Sequence Packing without Cross-contamination", arXiv:2107.02027). Bins that hold the same lengths
are one group and are filled together, which gives exactly the bins of best-fit-decreasing at a cost that follows the
number of distinct lengths. Rows then take their places in chunks, so that 100 million rows need little more memory
than the result: 4 bytes a row and 4 bytes a unit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ptl.data.order import permutation_keys, permute

_CHUNK = 1 << 20
_STREAM = 0x9ACC
"""Names the permutation that mixes rows of equal length, apart from those of the epochs."""


@dataclass(frozen=True)
class Packing:
    """Units of several rows each, in compressed form.

    Attributes:
        rows: row indices, unit after unit, uint32 (uint64 above 2**32 rows).
        offsets: unit u holds ``rows[offsets[u]:offsets[u + 1]]``; length U + 1.
        capacity: most tokens a unit may hold.
        tokens: tokens of all rows.
    """

    rows: np.ndarray
    offsets: np.ndarray
    capacity: int
    tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def utilisation(self) -> float:
        """Share of the units' capacity that holds tokens, in (0, 1]."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0

    def unit(self, index: int) -> np.ndarray:
        """The rows of one unit, longest first."""
        return self.rows[int(self.offsets[index]) : int(self.offsets[index + 1])]


class _Bins(NamedTuple):
    """Consecutive bins with the same contents: the first one's number, how many, and the rows in each."""

    first: int
    count: int
    held: int


class _Placements(NamedTuple):
    """Where the rows of each length go. One entry is a run of rows of one length over a run of bins.

    Rows are numbered longest first, then in their order of arrival. Entry i takes rows from ``start[i]`` on, gives
    ``each[i]`` of them to each bin from ``first[i]`` on, behind the ``held[i]`` rows that the bin already holds.
    """

    start: np.ndarray
    first: np.ndarray
    each: np.ndarray
    held: np.ndarray


def pack(lengths: np.ndarray, capacity: int, seed: int | None = 0, rows: np.ndarray | None = None) -> Packing:
    """Packs rows into the units of best-fit-decreasing.

    Args:
        lengths: tokens of each row, integers [N]; read in chunks, so it may be memory-mapped.
        capacity: most tokens of a unit.
        seed: which of the rows of equal length share a unit; None keeps them in order.
        rows: the rows to pack, distinct or not, when not all of them.

    Raises:
        ValueError: a row is longer than ``capacity``, or has no token.
    """
    count = len(lengths) if rows is None else len(rows)
    histogram = _histogram(lengths, capacity, rows)
    placements, bins = _best_fit(histogram, capacity)
    index = np.uint32 if max(count, len(lengths)) < 2**32 else np.uint64
    offsets = np.zeros(bins[0] + 1, index)
    for group in bins[1]:
        offsets[group.first + 1 : group.first + group.count + 1] = group.held
    np.cumsum(offsets, out=offsets)
    out = np.empty(count, index)
    _place(out, offsets, placements, histogram, lengths, seed, rows)
    tokens = int((histogram * np.arange(len(histogram))).sum())
    return Packing(out, offsets, capacity, tokens)


def join(packings: list[Packing]) -> Packing:
    """The units of several packings of one capacity, one after the other."""
    if len(packings) == 1:
        return packings[0]
    rows = np.concatenate([packing.rows for packing in packings])
    starts = np.cumsum([0] + [len(packing.rows) for packing in packings])
    offsets = np.concatenate(
        [packing.offsets[:-1] + rows.dtype.type(start) for packing, start in zip(packings, starts)]
        + [np.array([len(rows)], rows.dtype)]
    )
    return Packing(rows, offsets, packings[0].capacity, sum(packing.tokens for packing in packings))


def _chunks(count: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK)]


def _histogram(lengths: np.ndarray, capacity: int, rows: np.ndarray | None) -> np.ndarray:
    """Rows of each length, int64 [capacity + 1]."""
    histogram = np.zeros(capacity + 1, np.int64)
    for begin, end in _chunks(len(lengths) if rows is None else len(rows)):
        part = np.asarray(lengths[begin:end] if rows is None else lengths[rows[begin:end]])
        for bad, wish in (
            (part > capacity, f"at most {capacity}: raise `data.pack_to`, or lower `data.max_length`"),
            (part < 1, "at least 1: drop empty rows"),
        ):
            if bad.any():
                place = begin + int(bad.argmax())
                row = place if rows is None else int(rows[place])
                raise ValueError(f"row {row} has {part[bad.argmax()]} tokens, and packing takes {wish}")
        histogram += np.bincount(part, minlength=capacity + 1)
    return histogram


def _best_fit(histogram: np.ndarray, capacity: int) -> tuple[_Placements, tuple[int, list[_Bins]]]:
    """Best-fit-decreasing of all rows of a length at once.

    The fullest bins that still take the length get as many rows of it as they hold, as they would one row at a time:
    a bin that has just taken one is the fullest bin, until it takes no more.

    Returns:
        The placements, and (number of bins, groups of equal bins).
    """
    entries: list[tuple[int, int, int, int]] = []
    open_bins: dict[int, list[_Bins]] = {}  # free tokens -> groups
    free_sizes: list[int] = []  # sorted keys of open_bins
    made = placed = 0

    def put(free: int, group: _Bins) -> None:
        if free not in open_bins:
            open_bins[free] = []
            insort(free_sizes, free)
        open_bins[free].append(group)

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            at = bisect_left(free_sizes, length)
            if at < len(free_sizes):
                free = free_sizes[at]
                group = open_bins[free].pop()
                if not open_bins[free]:
                    del open_bins[free], free_sizes[at]
            else:
                free = capacity
                group = _Bins(made, -(-left // (capacity // length)), 0)
                made += group.count
            first, count, held = group
            most = free // length
            for bins, each in ((min(count, left // most), most), (1, left % most if left < count * most else 0)):
                if bins and each:
                    entries.append((placed, first, each, held))
                    put(free - each * length, _Bins(first, bins, held + each))
                    first, count = first + bins, count - bins
                    placed, left = placed + bins * each, left - bins * each
            if count:
                put(free, _Bins(first, count, held))
    table = np.array(entries, np.int64).reshape(-1, 4)
    return _Placements(*table.T.copy()), (made, [group for groups in open_bins.values() for group in groups])


def _place(
    out: np.ndarray,
    offsets: np.ndarray,
    placements: _Placements,
    histogram: np.ndarray,
    lengths: np.ndarray,
    seed: int | None,
    rows: np.ndarray | None,
) -> None:
    """Writes each row to its place. Rows arrive in a seeded order, which mixes those of equal length."""
    keys = None if seed is None else permutation_keys(seed, _STREAM)
    next_number = histogram.sum() - np.cumsum(histogram)  # of the next row of each length, longest first
    for begin, end in _chunks(len(out)):
        arrival = np.arange(begin, end)
        if keys is not None:
            arrival = permute(arrival, len(out), keys)
        chosen = arrival if rows is None else rows[arrival]
        size = np.asarray(lengths[chosen])
        # numpy sorts 16-bit integers by radix, many times faster.
        order = np.argsort(size.astype(np.uint16) if len(histogram) <= 1 << 16 else size, kind="stable")
        counts = np.bincount(size, minlength=len(histogram))
        numbers = np.arange(end - begin) + np.repeat(next_number - (np.cumsum(counts) - counts), counts)
        next_number += counts
        entry = np.searchsorted(placements.start, numbers, side="right") - 1
        bins, slot = np.divmod(numbers - placements.start[entry], placements.each[entry])
        place = offsets[placements.first[entry] + bins].astype(np.int64) + placements.held[entry] + slot
        out[place] = chosen[order]
