"""Packing: every row once, no pack too long, the bins of best-fit-decreasing, whatever the number of rows."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import pytest

from ptl.data.packing import join, pack


def best_fit_decreasing(lengths, capacity: int) -> int:
    """Bins of the textbook algorithm, one row at a time."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(free, length)
        insort(free, (free.pop(at) if at < len(free) else capacity) - length)
    return len(free)


def check(packing, lengths, rows=None):
    rows = range(len(lengths)) if rows is None else rows
    assert sorted(packing.rows.tolist()) == sorted(rows)
    sums = [int(lengths[packing.unit(unit)].sum()) for unit in range(len(packing))]
    assert min(sums) > 0 and max(sums) <= packing.capacity
    assert packing.tokens == sum(sums)
    assert packing.utilisation == pytest.approx(sum(sums) / (len(packing) * packing.capacity))


@pytest.mark.parametrize("case", range(60))
def test_same_number_of_packs_as_best_fit_decreasing(case):
    rng = np.random.default_rng(case)
    capacity = int(rng.integers(5, 400))
    longest = int(rng.integers(1, capacity + 1))
    lengths = rng.integers(1, longest + 1, int(rng.integers(1, 600))).astype(np.int32)
    packing = pack(lengths, capacity, seed=case)
    check(packing, lengths)
    assert len(packing) == best_fit_decreasing(lengths.tolist(), capacity)


@pytest.mark.parametrize("shape", ["chat", "equal", "two", "long"])
def test_utilisation_is_within_one_percent_of_best_fit_decreasing(shape):
    rng = np.random.default_rng(1)
    lengths = {
        "chat": np.clip(rng.lognormal(5.5, 0.8, 30_000), 16, 2048),
        "equal": np.full(30_000, 300),
        "two": rng.choice([700, 1400], 30_000),
        "long": rng.integers(1025, 2049, 30_000),
    }[shape].astype(np.int32)
    packing = pack(lengths, 2048)
    best = lengths.sum() / (best_fit_decreasing(lengths.tolist(), 2048) * 2048)
    assert packing.utilisation >= 0.99 * best
    check(packing, lengths)


def test_rows_over_several_chunks(monkeypatch):
    """The result does not depend on how many rows are placed at a time."""
    rng = np.random.default_rng(2)
    lengths = rng.integers(1, 100, 5000).astype(np.int32)
    whole = pack(lengths, 128, seed=3)
    monkeypatch.setattr("ptl.data.packing._CHUNK", 37)
    parts = pack(lengths, 128, seed=3)
    assert whole.rows.tolist() == parts.rows.tolist() and whole.offsets.tolist() == parts.offsets.tolist()


def test_seed_mixes_rows_of_equal_length():
    lengths = np.full(1000, 10, np.int32)
    plain, a, b = (pack(lengths, 40, seed) for seed in (None, 0, 1))
    assert plain.rows.tolist() == list(range(1000))
    assert a.rows.tolist() != b.rows.tolist() != plain.rows.tolist()
    assert pack(lengths, 40, 0).rows.tolist() == a.rows.tolist()


def test_subset_of_rows():
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 60, 500).astype(np.int32)
    rows = np.flatnonzero(lengths % 3 == 0)
    packing = pack(lengths, 64, seed=0, rows=rows)
    check(packing, lengths, rows.tolist())


def test_join_puts_packs_one_after_the_other():
    lengths = np.arange(1, 41).astype(np.int32)
    parts = [pack(lengths, 64, rows=rows) for rows in (np.arange(0, 10), np.arange(10, 40))]
    both = join(parts)
    check(both, lengths)
    assert len(both) == len(parts[0]) + len(parts[1])
    assert both.unit(len(parts[0])).tolist() == parts[1].unit(0).tolist()


def test_four_bytes_a_row_and_a_pack():
    lengths = np.random.default_rng(0).integers(1, 2049, 10_000).astype(np.int32)
    packing = pack(lengths, 2048)
    assert packing.rows.dtype == packing.offsets.dtype == np.uint32
    assert pack(np.zeros(0, np.int32), 8).utilisation == 1.0


def test_row_that_cannot_fit_is_named():
    with pytest.raises(ValueError, match=r"row 2 has 90 tokens.*at most 64.*data\.pack_to.*data\.max_length"):
        pack(np.array([3, 64, 90], np.int32), 64)
    with pytest.raises(ValueError, match=r"row 5 has 0 tokens"):
        pack(np.array([1, 1, 1, 1, 1, 0], np.int32), 64, rows=np.array([4, 5]))
