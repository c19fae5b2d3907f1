"""The units of a data set: which rows belong together, what they weigh, and how often an epoch sees them.

A unit is a row, or a pack of rows. Which rows a unit holds never changes during a run; the order of the units does,
with the epoch. The tables are made once, kept beside the prepared rows and memory-mapped by every rank, so that the
ranks of a node share them.

**Weights of sources.** ``Source.weight`` says how many times an epoch sees the source: 2.0 twice, 0.5 a seeded half.
A source's units lie on a ring in a seeded order, and each epoch takes the next ``weight * units`` of them where the
last one stopped, so that two epochs of weight 0.5 see each unit once. The share is rounded to whole units, and is never
none. With packing, a source whose weight is not 1 is packed apart from the others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from ptl.data.order import permutation_keys, permute
from ptl.data.packing import Packing, join, pack

_CHUNK = 1 << 20
_RING = 0x21B6
"""Names the permutation that orders the ring of a weighted source."""


class Table(Protocol):
    """What units are made of: memory-mapped columns of the prepared rows."""

    @property
    def rows(self) -> Any: ...
    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def weights(self) -> np.ndarray: ...
    @property
    def source_ids(self) -> np.ndarray: ...


@dataclass(frozen=True)
class RowSet:
    """A sequence of rows, kept as runs of consecutive ones: all rows of a data set are one run.

    Attributes:
        starts: first row of each run, int64 [R].
        ends: rows up to and with each run, int64 [R].
    """

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def select(cls, count: int, keep: Callable[[int, int], np.ndarray]) -> RowSet:
        """The rows of [0, count) that ``keep(begin, end)``, a mask of rows begin to end, marks."""
        starts, stops = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for begin, end in chunks(count):
            edges = np.flatnonzero(np.diff(keep(begin, end).astype(np.int8), prepend=0, append=0)) + begin
            starts.append(edges[::2])
            stops.append(edges[1::2])
        start, stop = np.concatenate(starts), np.concatenate(stops)
        breaks = np.flatnonzero(start[1:] != stop[:-1]) + 1  # a run that crosses two chunks is one run
        firsts, lasts = np.r_[start[:1], start[breaks]], np.r_[stop[breaks - 1], stop[-1:]]
        return cls(firsts, np.cumsum(lasts - firsts))

    @classmethod
    def chain(cls, parts: Sequence[RowSet]) -> RowSet:
        """The rows of several sets, one set after the other."""
        before = np.cumsum([0] + [len(part) for part in parts])
        ends = [part.ends + offset for part, offset in zip(parts, before)]
        return cls(np.concatenate([part.starts for part in parts]), np.concatenate(ends))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The rows, int64, at these positions of the sequence."""
        run = np.searchsorted(self.ends, positions, side="right")
        before = np.where(run > 0, self.ends[run - 1], 0)
        return self.starts[run] + positions - before


@dataclass(frozen=True)
class Group:
    """Units that an epoch sees equally often.

    Attributes:
        units: how many.
        weight: how many times an epoch sees each, on average over epochs.
    """

    units: int
    weight: float

    @property
    def entries(self) -> int:
        """Units an epoch takes from the group."""
        return max(1, int(self.weight * self.units + 0.5)) if self.units else 0


@dataclass(frozen=True)
class Units:
    """The units of a data set.

    Attributes:
        members: the rows of each unit.
        groups: consecutive units of equal weight.
        lengths: tokens of each row.
        weights: loss weight of each row.
        tokens: tokens of all units together.
        seed: of the rings of weighted sources.
    """

    members: RowSet | Packing
    groups: tuple[Group, ...]
    lengths: np.ndarray
    weights: np.ndarray
    tokens: int
    seed: int

    def __len__(self) -> int:
        return len(self.members)

    @property
    def entries(self) -> int:
        """Units that an epoch sees, repeats counted."""
        return sum(group.entries for group in self.groups)

    def of_epoch(self, epoch: int, entries: np.ndarray) -> np.ndarray:
        """The unit of each entry, in [0, ``entries``), of an epoch."""
        if all(group.weight == 1 for group in self.groups):
            return entries
        units = np.empty(len(entries), np.int64)
        first_unit = first_entry = 0
        for number, group in enumerate(self.groups):
            inside = (entries >= first_entry) & (entries < first_entry + group.entries)
            if inside.any():
                ring = (entries[inside] - first_entry + epoch * group.entries % group.units) % group.units
                units[inside] = first_unit + permute(ring, group.units, permutation_keys(self.seed, _RING, number))
            first_unit += group.units
            first_entry += group.entries
        return units

    def rows(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the units, one unit after the other, int64, and how many each unit has."""
        if isinstance(self.members, RowSet):
            return self.members.at(units), np.ones(len(units), np.int64)
        begins = self.members.offsets[units].astype(np.int64)
        counts = self.members.offsets[units + 1].astype(np.int64) - begins
        ends = np.cumsum(counts)
        places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - ends + counts, counts)
        return self.members.rows[places].astype(np.int64), counts

    def sizes(self, units: np.ndarray) -> np.ndarray:
        """Tokens of each unit, int64."""
        return self._sums(self.lengths, units, np.int64)

    def loss_weights(self, units: np.ndarray) -> np.ndarray:
        """Loss weight of each unit, float64."""
        return self._sums(self.weights, units, np.float64)

    def _sums(self, column: np.ndarray, units: np.ndarray, dtype: type) -> np.ndarray:
        rows, counts = self.rows(units)
        return np.bincount(np.repeat(np.arange(len(units)), counts), column[rows], len(units)).astype(dtype)

    def summary(self) -> dict[str, Any]:
        """Counts for a report; ``utilisation`` is the share of the packs' capacity that holds tokens."""
        facts: dict[str, Any] = {"units": len(self), "units_per_epoch": self.entries, "tokens": self.tokens}
        if isinstance(self.members, Packing):
            facts |= {"rows": len(self.members.rows), "utilisation": self.members.utilisation}
        return facts


def chunks(count: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))


def build_units(
    table: Table,
    *,
    weights: Sequence[float],
    capacity: int | None,
    seed: int,
    keep: Callable[[int, int], np.ndarray] | None = None,
) -> Units:
    """Makes the units of prepared rows.

    Args:
        table: the prepared rows.
        weights: of each source, as in the module's text.
        capacity: tokens of a pack; None makes each row a unit.
        seed: of the packing and of the weighted sources' order.
        keep: mask of the rows to use; None uses all.

    Raises:
        ValueError: a row is longer than ``capacity``.
    """
    count = len(table.lengths)
    if all(weight == 1 for weight in weights):
        parts = [(1.0, RowSet.select(count, keep) if keep else RowSet(np.zeros(1, np.int64), np.array([count])))]
    else:
        kinds: list[tuple[float, list[int]]] = [(1.0, [i for i, weight in enumerate(weights) if weight == 1])]
        kinds += [(weight, [i]) for i, weight in enumerate(weights) if weight != 1]
        parts = [(weight, RowSet.select(count, _of_sources(table, sources, keep))) for weight, sources in kinds]
    parts = [(weight, rows) for weight, rows in parts if len(rows)]
    members: RowSet | Packing
    if capacity is None:
        members = RowSet.chain([rows for _, rows in parts])
        groups = [Group(len(rows), weight) for weight, rows in parts]
        tokens = sum(
            int(np.asarray(table.lengths[members.at(np.arange(begin, end))]).sum(dtype=np.int64))
            for begin, end in chunks(len(members))
        )
    else:
        packs = [
            pack(table.lengths, capacity, seed, None if len(rows) == count else _listed(rows)) for _, rows in parts
        ]
        members = join(packs)
        groups = [Group(len(packed), weight) for (weight, _), packed in zip(parts, packs)]
        tokens = members.tokens
    return Units(members, tuple(groups), table.lengths, table.weights, tokens, seed)


def _of_sources(
    table: Table, sources: list[int], keep: Callable[[int, int], np.ndarray] | None
) -> Callable[[int, int], np.ndarray]:
    def mask(begin: int, end: int) -> np.ndarray:
        inside = np.isin(table.source_ids[begin:end], sources)
        return inside if keep is None else inside & keep(begin, end)

    return mask


def _listed(rows: RowSet) -> np.ndarray:
    out = np.empty(len(rows), np.uint32 if len(rows) == 0 or int(rows.starts.max()) + len(rows) < 2**32 else np.uint64)
    for begin, end in chunks(len(rows)):
        out[begin:end] = rows.at(np.arange(begin, end))
    return out


def cached_units(folder: Path, table: Table, build: Callable[[], Units]) -> Units:
    """The units kept in ``folder``, memory-mapped; made first by the one process that finds none there.

    Args:
        folder: named after all that the units depend on; appears at once, whole.
        table: the prepared rows that the units were or will be made of.
        build: makes them.
    """
    if not folder.exists():
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                _save(build(), folder)
    facts = json.loads((folder / "units.json").read_text())
    first, second = (np.load(folder / name, mmap_mode="r") for name in ("first.npy", "second.npy"))
    packed = facts["capacity"] is not None
    members = Packing(first, second, facts["capacity"], facts["tokens"]) if packed else RowSet(first, second)
    groups = tuple(Group(**group) for group in facts["groups"])
    return Units(members, groups, table.lengths, table.weights, facts["tokens"], facts["seed"])


def _save(units: Units, folder: Path) -> None:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    first, second = (
        (units.members.rows, units.members.offsets)
        if isinstance(units.members, Packing)
        else (units.members.starts, units.members.ends)
    )
    np.save(partial / "first.npy", first)
    np.save(partial / "second.npy", second)
    facts = {
        "capacity": units.members.capacity if isinstance(units.members, Packing) else None,
        "tokens": units.tokens,
        "seed": units.seed,
        "groups": [{"units": group.units, "weight": group.weight} for group in units.groups],
    }
    (partial / "units.json").write_text(json.dumps(facts))
    os.replace(partial, folder)
