"""Weighted means over micro-batches and ranks, with one reduction for all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from ptl.functional.ranking_measures import TOTAL, ranking_sums
from ptl.types import GroupBatch


class WeightedMeans(Metric):
    """Named ratios sum / weight, added up on the device and reduced over ranks when computed.

    All names share one float64 state [K, 2], so a log costs one collective however many names there are, and no
    device synchronisation happens between logs.

    Arguments:
        names: the K names, the same on every rank.
    """

    full_state_update = False
    values: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self._index = {name: i for i, name in enumerate(names)}
        self.add_state("values", torch.zeros(len(names), 2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Adds ``name -> (sum, weight)``; a name that is absent adds nothing.

        Raises:
            KeyError: a name that was not declared.
        """
        for name, (total, weight) in metrics.items():
            row = self.values[self._index[name]]
            row[0] += total.detach().to(torch.float64)
            row[1] += weight.detach().to(torch.float64)

    def compute(self) -> dict[str, Tensor]:
        """``name -> sum / weight``; a name with no weight anywhere is left out."""
        values = self.values.cpu()
        return {name: values[i, 0] / values[i, 1] for name, i in self._index.items() if values[i, 1] > 0}


class RankingMeasures(Metric):
    """The sums of ``ptl.functional.ranking_measures`` over micro-batches and ranks, one collective when computed."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(TOTAL, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor) -> None:
        """Adds a batch's sums [TOTAL], of ``batch_sums``."""
        self.sums += sums

    def compute(self) -> Tensor:
        """float64 [TOTAL]; ``measures_of`` makes numbers of it."""
        return self.sums


def batch_sums(rewards: Tensor, batch: GroupBatch) -> Tensor:
    """``ranking_sums`` of the scores [D] of a batch's answers, float64 [TOTAL]."""
    return ranking_sums(rewards, batch.lengths, batch.groups, batch.pairs, batch.tied, batch.prompt_weights)
