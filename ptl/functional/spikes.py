"""Which of a run's numbers stands out from those before it."""

from __future__ import annotations

import torch
from torch import Tensor

_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation, where numbers are normal."""
_LEAST_SPREAD = 0.05
"""Spread over the median that is taken at least: numbers that hardly vary would make anything stand out."""


def spike_limit(history: Tensor, deviations: float, least: int) -> Tensor:
    """The highest number that does not stand out: the median plus so many robust standard deviations.

    Median and median absolute deviation do not follow the spikes themselves. Nothing is read on the host.

    Args:
        history: [N], NaN where nothing is known yet.
        deviations: how many.
        least: known numbers below which nothing stands out.

    Returns:
        [] of ``history``'s dtype; infinite while too few are known.
    """
    known = torch.isfinite(history)
    history = torch.where(known, history, torch.nan)
    median = history.nanmedian()
    spread = torch.maximum(_NORMAL * (history - median).abs().nanmedian(), _LEAST_SPREAD * median.abs())
    return torch.where(known.sum() >= least, median + deviations * spread, torch.inf)
