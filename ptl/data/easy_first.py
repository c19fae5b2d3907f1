"""Prompts from easy to hard: an epoch walks them by how often they were solved when they were rated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ptl.data.order import permutation_keys, permute
from ptl.data.parts import Part
from ptl.data.prompts import record_of


class EasyFirst:
    """The order of an epoch's units by pass rate, the highest first; those of one rate are in the epoch's own order.

    As a function of data, seed and epoch it is the same on any number of ranks, and a resume goes on in it. Unlike a
    permutation it is listed, 8 bytes a unit, and made once an epoch.

    Args:
        part: prepared rows with a column ``pass_rate``, a row a unit.
        seed: of the order among equals.
        shuffle: False leaves equals in the order they were made.

    Attributes:
        digest: hexadecimal, of all units' rates: other rates are another order.

    Raises:
        ValueError: rows have no rate, with the first of them and the keys to change.
    """

    def __init__(self, part: Part, *, seed: int, shuffle: bool) -> None:
        self._units, self._seed, self._shuffle = part.units, seed, shuffle
        self._rates = _rates(part)
        self.digest = hashlib.blake2b(self._rates.tobytes(), digest_size=8).hexdigest()
        self._listed: tuple[int, np.ndarray] | None = None

    def of_epoch(self, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        """What gives the units at positions of an epoch, for ``Plan.order``; nothing is sorted before it is asked."""
        return lambda positions: self._order(epoch)[positions]

    def _order(self, epoch: int) -> np.ndarray:
        if self._listed is None or self._listed[0] != epoch:
            entries = np.arange(self._units.entries)
            keys = permutation_keys(self._seed, epoch)
            walk = permute(entries, len(entries), keys) if self._shuffle else entries
            self._listed = epoch, easiest_first(self._rates[self._units.of_epoch(epoch, entries)], walk)
        return self._listed[1]


def easiest_first(rates: np.ndarray, walk: np.ndarray) -> np.ndarray:
    """A walk through all units, reordered: the highest rate first.

    Args:
        rates: [N], of each unit; none is NaN.
        walk: integers [N], a permutation of [0, N), which units of one rate keep to.

    Returns:
        Integers [N].
    """
    return walk[np.argsort(-rates[walk], kind="stable")]


def _rates(part: Part) -> np.ndarray:
    """The pass rate of each unit, float32 [units]."""
    rows = part.units.rows(np.arange(len(part.units)))[0]
    table: Any = part.prepared.rows.select_columns(["pass_rate"]).with_format("arrow")[:]
    rates = table.column("pass_rate").to_numpy()[rows]  # NaN for null
    unrated = np.flatnonzero(np.isnan(rates))
    if len(unrated):
        first = record_of(part.prepared.rows[int(rows[unrated[0]])]["prompt"]).origin
        raise ValueError(
            f"data.easy_first orders prompts by their pass_rate, and {len(unrated)} of {len(rates)} rows have none "
            f"from 0 to 1, the first at {first}: name rated files in data.train (an evaluation writes one, "
            "pass_rates.jsonl), say which column it is with `columns: {pass_rate: COLUMN}`, or remove data.easy_first"
        )
    return rates
