"""Exact duplicates in a stream of digests, in 16 bytes a row of memory."""

from __future__ import annotations

import numpy as np

DIGEST = np.dtype("S16")


class Seen:
    """A growing set of 16-byte digests: sorted runs, merged so that their number stays logarithmic."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Adds digests and tells which were there before, earlier in this array included.

        Args:
            digests: ``DIGEST`` [N].

        Returns:
            bool [N].
        """
        new, first = np.unique(digests, return_index=True)
        known = np.zeros(len(new), bool)
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, new), len(run) - 1)
            known |= run[at] == new
        repeated = np.ones(len(digests), bool)
        repeated[first[~known]] = False
        if not known.all():
            self.runs.append(new[~known])
        while len(self.runs) > 1 and len(self.runs[-1]) * 2 > len(self.runs[-2]):
            last, before = self.runs.pop(), self.runs.pop()
            self.runs.append(np.sort(np.concatenate([before, last]), kind="stable"))
        return repeated
