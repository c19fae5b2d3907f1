"""The order of training: a pure function of (seed, epoch, step, rank, micro-batch), in O(1) memory.

A *unit* is what is never split: a row, or a pack of rows. An epoch walks a seeded permutation of its units. The
permutation is a Feistel network, so that any position is computed alone: no index list is held, and a resume jumps to
where it goes on. An optimizer step takes the next ``world_size * accumulate * micro_batch_size`` units, its *window*,
and only then deals them to micro-batches and ranks: the units of a step do not depend on how the window is factored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_ROUNDS = 6
_SORTED_SIZE = 1024
"""Up to this size a permutation is sorted out whole: halves of a few bits would not mix well."""
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_FOLD = np.uint64(32)


def permutation_keys(seed: int, *stream: int) -> np.ndarray:
    """Round keys, uint64 [6], of the permutation named by non-negative integers such as (seed, epoch)."""
    if min(seed, *stream, 0) < 0:
        raise ValueError(f"a seed is 0 or more: got {seed}. Change `data.seed`")
    return np.random.SeedSequence([seed, *stream]).generate_state(_ROUNDS, np.uint64)


def permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A pseudo-random bijection of [0, size), for the given positions alone.

    An alternating Feistel network permutes the smallest power of two that holds ``size``; a value that falls outside
    walks on along its cycle until it is inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    Under two evaluations a position on average, whatever the size. A small range is sorted by hash instead.

    Args:
        positions: integers [N] in [0, size).
        size: how many values are permuted.
        keys: from ``permutation_keys``.

    Returns:
        int64 [N], the images.
    """
    if size < 2:
        return np.zeros(len(positions), np.int64)
    if size <= _SORTED_SIZE:
        hashes = scramble(scramble(np.arange(size, dtype=np.uint64), keys[0], 64), keys[1], 64)
        return np.argsort(hashes)[positions]
    bits = (size - 1).bit_length()
    image = _feistel(np.asarray(positions).astype(np.uint64), bits, keys)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        walked = _feistel(image[outside], bits, keys)
        image[outside] = walked
        outside = outside[walked >= size]
    return image.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 2**bits) over uint64 values: in each round one half is xored with a hash of the other."""
    low_bits = bits // 2
    high = values >> np.uint64(low_bits)
    low = values & np.uint64((1 << low_bits) - 1)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            high ^= scramble(low, key, bits - low_bits)
        else:
            low ^= scramble(high, key, low_bits)
    return (high << np.uint64(low_bits)) | low


def scramble(values: np.ndarray, key: np.uint64, bits: int) -> np.ndarray:
    """``bits`` well mixed bits of each uint64 value under a key: two multiplications, the top bits kept."""
    mixed = (values ^ key) * _MULTIPLIERS[0]
    mixed ^= mixed >> _FOLD
    mixed *= _MULTIPLIERS[1]
    return mixed >> np.uint64(64 - bits)


class Deal(NamedTuple):
    """What each micro-batch of an optimizer step holds.

    Attributes:
        units: int64 [..., micro_batch_size].
        real: bool, same shape; False marks a filler, a copy of another unit that carries no loss weight.
    """

    units: np.ndarray
    real: np.ndarray


class Place(NamedTuple):
    """Where an optimizer step stands in a rollout.

    Attributes:
        first: first window of the rollout, from the plan's start.
        count: windows of the rollout; the last one of an epoch may have fewer.
        window: the step's own, in [0, count).
    """

    first: int
    count: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which units each rank trains on, at each step of one epoch.

    Attributes:
        units: units of the epoch.
        seed: of the permutation.
        epoch: from 0; each has its own permutation.
        world_size: data-parallel ranks.
        accumulate: micro-batches of a rank in one optimizer step.
        micro_batch_size: units in a micro-batch.
        start: units of this epoch that are already consumed; step 0 begins there. After a resume with other ranks or
            another accumulation this need not be a multiple of the window.
        shuffle: False walks the units in their own order.
        windows: steps whose units are sampled together, for objectives that sample answers; see ``locate``.
        passes: how often those steps are walked before the next units are sampled.
        inner: steps that are done of the rollout that begins at ``start``.
        order: gives the units, int64 [N], at positions of the epoch, where they are in another order than the seeded
            or their own (``easy_first``); a bijection of [0, ``units``) that depends on data, seed and epoch alone.
    """

    units: int
    seed: int = 0
    epoch: int = 0
    world_size: int = 1
    accumulate: int = 1
    micro_batch_size: int = 1
    start: int = 0
    shuffle: bool = True
    windows: int = 1
    passes: int = 1
    inner: int = 0
    order: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        for name in ("world_size", "accumulate", "micro_batch_size", "windows", "passes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more: got {getattr(self, name)}")
        if not 0 <= self.start <= self.units:
            raise ValueError(f"start lies in the {self.units} units of the epoch: got {self.start}")

    @property
    def window_size(self) -> int:
        """Units in a whole optimizer step, over all ranks."""
        return self.world_size * self.accumulate * self.micro_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the epoch had it begun at unit 0."""
        return -(-self.units // self.window_size) * self.passes

    @property
    def steps(self) -> int:
        """Optimizer steps from ``start`` to the end of the epoch; the last one may be partial, and is trained."""
        return self._windows_left * self.passes - self.inner

    @property
    def _windows_left(self) -> int:
        return -(-(self.units - self.start) // self.window_size)

    def consumed(self, steps: int) -> int:
        """Units of the epoch that are done with after this many steps from ``start``; a rollout counts as a whole."""
        return self.after(steps)[0]

    def after(self, steps: int) -> tuple[int, int]:
        """``consumed``, and how many of the steps are of the rollout that comes next: ``inner`` of the plan there."""
        whole, inner = divmod(steps + self.inner, self.windows * self.passes)
        units = self.start + whole * self.windows * self.window_size
        return (units, inner) if units < self.units and steps < self.steps else (self.units, 0)

    def locate(self, step: int) -> Place:
        """Where a step stands in its rollout: ``windows`` windows of units that are walked ``passes`` times."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        whole, inner = divmod(step + self.inner, self.windows * self.passes)
        count = min(self.windows, self._windows_left - whole * self.windows)
        return Place(whole * self.windows, count, inner % count)

    def window(self, step: int) -> np.ndarray:
        """Units, int64 [<= window_size], of one optimizer step over all ranks. Costs the same at any step."""
        place = self.locate(step)
        return self.units_at(self.positions(place.first + place.window))

    def positions(self, window: int) -> np.ndarray:
        """The positions in the epoch, int64 [<= window_size], of a window counted from ``start``."""
        begin = self.start + window * self.window_size
        return np.arange(min(begin, self.units), min(begin + self.window_size, self.units))

    def units_at(self, positions: np.ndarray) -> np.ndarray:
        """The units, int64 [N], at positions of the epoch."""
        if self.order is not None:
            return self.order(positions)
        return permute(positions, self.units, permutation_keys(self.seed, self.epoch)) if self.shuffle else positions

    def deal(
        self,
        step: int,
        rank: int,
        lengths: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        bucket: bool = False,
    ) -> Deal:
        """The micro-batches of one rank in one optimizer step.

        Args:
            step: from ``start``.
            rank: of ``world_size``.
            lengths: tokens of the given units; None takes all as equal.
            bucket: as in ``deal_window``.

        Returns:
            Arrays [accumulate, micro_batch_size].
        """
        window = self.window(step)
        return self.share(window, np.ones(len(window), np.int64) if lengths is None else lengths(window), rank, bucket)

    def share(self, units: np.ndarray, lengths: np.ndarray, rank: int, bucket: bool = False) -> Deal:
        """One rank's part, arrays [accumulate, micro_batch_size], of a window of units with these lengths."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} of {self.world_size}")
        dealt = deal_window(units, lengths, self.world_size, self.accumulate, self.micro_batch_size, bucket=bucket)
        return Deal(dealt.units[:, rank], dealt.real[:, rank])


def deal_window(
    units: np.ndarray, lengths: np.ndarray, world_size: int, accumulate: int, micro_batch_size: int, *, bucket: bool
) -> Deal:
    """Deals the units of an optimizer step to micro-batches and ranks, balanced by tokens.

    Units are sorted, longest first, and dealt in rounds, one to each micro-batch, the longest of a round to the
    micro-batch that holds least. Micro-batches go to ranks in the same way, so that ranks that wait for each other hold
    neighbours in size, and all have near the same sum. Places that stay empty in a last, partial window get a filler: a
    copy of the shortest unit, so that all ranks run the same number of batches.

    Args:
        units: int64 [N], N <= world_size * accumulate * micro_batch_size, not empty.
        lengths: tokens of each unit [N].
        world_size: ranks.
        accumulate: micro-batches a rank.
        micro_batch_size: places a micro-batch.
        bucket: give a micro-batch units of similar length, which keeps padding small, in place of balanced totals.

    Returns:
        Arrays [accumulate, world_size, micro_batch_size].
    """
    batches = world_size * accumulate
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    padded = np.full(batches * micro_batch_size, order[-1])
    padded[: len(order)] = order
    real = np.arange(len(padded)) < len(order)
    if bucket:
        table, mask = padded.reshape(batches, -1), real.reshape(batches, -1)
        sums = lengths[table].max(axis=1) * micro_batch_size
    else:
        sums = np.zeros(batches, np.int64)
        table, mask = np.empty((batches, micro_batch_size), np.int64), np.empty((batches, micro_batch_size), bool)
        for place in range(micro_batch_size):
            taken, least = slice(place * batches, (place + 1) * batches), np.argsort(sums, kind="stable")
            table[least, place], mask[least, place] = padded[taken], real[taken]
            sums[least] += lengths[padded[taken]]
    by_size = np.argsort(-sums, kind="stable").reshape(accumulate, world_size)
    loads = np.zeros(world_size, np.int64)
    dealt = np.empty_like(by_size)
    for turn, ready in enumerate(by_size):
        least = np.argsort(loads, kind="stable")
        dealt[turn, least] = ready
        loads[least] += sums[ready]
    return Deal(units[table][dealt], mask[dealt])
