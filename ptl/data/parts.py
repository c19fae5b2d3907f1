"""The parts of a data set, ``train`` and ``val``: prepared rows and the units made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ptl.data.held_out import HeldOut
from ptl.data.prepare import Prepared
from ptl.data.units import Units, build_units, cached_units
from ptl.paths import cache_root

_VERSION = 1
"""Part of the key of kept units; raised when the same settings make other units."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How rows are tokenised and kept.

    Attributes:
        deduplicate: drop rows that are equal to an earlier one after rendering.
        cache_dir: where prepared rows are kept; None is ``$PTL_CACHE``, else ``~/.cache/ptl``.
        num_proc: processes that tokenise; None takes all cores.
    """

    deduplicate: bool = False
    cache_dir: str | None = None
    num_proc: int | None = None

    @property
    def folder(self) -> Path:
        """``cache_dir`` or its default."""
        return Path(self.cache_dir) if self.cache_dir else cache_root()


@dataclass(frozen=True)
class Part:
    """Prepared rows and the units made of them."""

    prepared: Prepared
    units: Units


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which rows of a data set a part takes: all, those held out for validation, or the others.

    Attributes:
        fraction: share of the conversations that is held out, in (0, 1).
        held_out: take the held-out rows, or the others.
    """

    fraction: float
    held_out: bool


def open_part(
    prepared: Prepared, *, weights: Sequence[float], capacity: int | None, seed: int, split: Split | None
) -> Part:
    """The part with its units, made first where they are not kept beside the rows yet.

    Args:
        prepared: the rows.
        weights: how many times an epoch sees each source.
        capacity: tokens of a pack; None makes each row a unit.
        seed: of packing and of weighted sources.
        split: None takes all rows.
    """
    settings = [_VERSION, list(weights), capacity, seed, [split.fraction, split.held_out] if split else None]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()

    def build() -> Units:
        keep = None
        if split is not None:
            chosen = HeldOut(prepared, split.fraction)
            keep = chosen if split.held_out else lambda begin, end: ~chosen(begin, end)
        return build_units(prepared, weights=weights, capacity=capacity, seed=seed, keep=keep)

    return Part(prepared, cached_units(Path(prepared.path) / f"units-{key}", prepared, build))
