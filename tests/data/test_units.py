"""Units: runs of rows, weights of sources over epochs, held-out conversations, and tables kept on disk."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
from datasets import Dataset

from ptl.data.held_out import HeldOut
from ptl.data.units import RowSet, build_units, cached_units


@dataclass(frozen=True)
class Columns:
    """Prepared rows as far as units need them: ``counts[i]`` rows of source i, two documents a line."""

    counts: tuple[int, ...]

    @property
    def source_ids(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.counts)), self.counts).astype(np.int16)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.random.default_rng(0).integers(5, 60, sum(self.counts)).astype(np.int32)

    @property
    def weights(self) -> np.ndarray:
        return (self.lengths / 3).astype(np.float32)

    @cached_property
    def rows(self) -> Dataset:
        return Dataset.from_dict({"line": np.arange(sum(self.counts)) // 2 + 1, "length": self.lengths})


@pytest.mark.parametrize("case", range(20))
def test_row_set_is_the_marked_rows(case, monkeypatch):
    monkeypatch.setattr("ptl.data.units._CHUNK", 17)
    mask = np.random.default_rng(case).random(300) < (0.03, 0.5, 0.97, 0.0, 1.0)[case % 5]
    rows = RowSet.select(300, lambda begin, end: mask[begin:end])
    assert len(rows) == mask.sum()
    assert rows.at(np.arange(len(rows))).tolist() == np.flatnonzero(mask).tolist()
    both = RowSet.chain([rows, RowSet(np.array([5]), np.array([3]))])
    assert both.at(np.arange(len(both))).tolist() == [*np.flatnonzero(mask).tolist(), 5, 6, 7]


def test_all_rows_are_one_run():
    units = build_units(Columns((10**4,)), weights=(1.0,), capacity=None, seed=0)
    assert isinstance(units.members, RowSet) and len(units.members.starts) == 1
    entries = np.array([7, 3])
    assert units.of_epoch(4, entries) is entries


@pytest.mark.parametrize("capacity", [None, 64])
def test_weights_say_how_often_an_epoch_sees_a_source(capacity):
    table = Columns((40, 60, 30, 50))
    units = build_units(table, weights=(1.0, 2.0, 0.5, 1.5), capacity=capacity, seed=3)
    seen: Counter[int] = Counter()
    halves = []
    for epoch in range(2):
        counts = Counter(units.of_epoch(epoch, np.arange(units.entries)).tolist())
        by_source: list[list[int]] = [[], [], [], []]
        for unit in range(len(units)):
            rows, _ = units.rows(np.array([unit]))
            sources = set(table.source_ids[rows].tolist())
            assert len(sources) == 1 or sources == {0}
            by_source[sources.pop()].append(counts[unit])
        assert set(by_source[0]) == {1} and set(by_source[1]) == {2} and set(by_source[3]) <= {1, 2}
        assert set(by_source[2]) == {0, 1}
        assert sum(by_source[2]) == int(len(by_source[2]) / 2 + 0.5)
        assert sum(by_source[3]) == int(len(by_source[3]) * 1.5 + 0.5)
        halves.append(by_source[2])
        seen += counts
    assert halves[0] != halves[1]
    if capacity is None:
        rows_seen = Counter(int(table.source_ids[units.rows(np.array([u]))[0]][0]) for u in seen.elements())
        assert rows_seen == {0: 80, 1: 240, 2: 30, 3: 150}
        assert len(seen) == 180


def test_a_rare_source_is_never_lost():
    units = build_units(Columns((100, 1)), weights=(1.0, 0.01), capacity=None, seed=0)
    assert units.entries == 101


@pytest.mark.parametrize("capacity", [None, 64])
def test_sizes_and_weights_of_units(capacity):
    table = Columns((200,))
    units = build_units(table, weights=(1.0,), capacity=capacity, seed=1)
    ids = np.random.default_rng(0).permutation(len(units))
    sizes, weights = units.sizes(ids), units.loss_weights(ids)
    for unit, size, weight in zip(ids, sizes, weights):
        rows, counts = units.rows(np.array([unit]))
        assert counts.tolist() == [len(rows)]
        assert size == table.lengths[rows].sum() and weight == pytest.approx(float(table.weights[rows].sum()))
    assert units.tokens == table.lengths.sum() == sizes.sum()
    rows, counts = units.rows(ids)
    assert sorted(rows.tolist()) == list(range(200)) and counts.sum() == 200


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_held_out_conversations_are_whole_and_stay(fraction):
    table = Columns((4000, 2000))
    chosen = HeldOut(table, fraction)(0, 6000)
    assert abs(chosen.mean() - fraction) < 0.02
    pairs = chosen.reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all(), "documents of one conversation fall on both sides"
    grown = HeldOut(Columns((4000, 3000)), fraction)(0, 6000)
    assert (grown == chosen).all(), "rows that were added moved others"


def test_held_out_of_few_rows():
    assert HeldOut(Columns((10,)), 1e-6)(0, 10).sum() == 2  # one line, two documents
    with pytest.raises(ValueError, match=r"data\.val_fraction 0\.5 of 2 rows leaves none"):
        HeldOut(Columns((2,)), 0.5)


@pytest.mark.parametrize("capacity", [None, 64])
def test_kept_units_are_made_once_and_memory_mapped(tmp_path, capacity):
    table = Columns((300, 100))
    made = []

    def build():
        made.append(build_units(table, weights=(1.0, 0.5), capacity=capacity, seed=2))
        return made[-1]

    first = cached_units(tmp_path / "units", table, build)
    second = cached_units(tmp_path / "units", table, build)
    assert len(made) == 1 and not list(tmp_path.glob("*.partial"))
    entries = np.arange(made[0].entries)
    for units in (first, second):
        assert units.groups == made[0].groups and units.summary() == made[0].summary()
        assert np.array_equal(units.rows(units.of_epoch(3, entries))[0], made[0].rows(made[0].of_epoch(3, entries))[0])
        arrays = (units.members.starts,) if isinstance(units.members, RowSet) else (units.members.rows,)
        assert all(isinstance(array, np.memmap) for array in arrays)


def test_a_build_that_was_killed_leaves_nothing_behind(tmp_path):
    table = Columns((30,))
    (tmp_path / "units.partial").mkdir()
    (tmp_path / "units.partial" / "first.npy").write_bytes(b"half")
    units = cached_units(tmp_path / "units", table, lambda: build_units(table, weights=(1.0,), capacity=64, seed=0))
    assert units.tokens == table.lengths.sum()
