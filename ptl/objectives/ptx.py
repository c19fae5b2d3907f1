"""Conversations that a policy goes on learning from while it is trained on rewards, so that it forgets less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ptl.data.loader import MicroBatch, RowDataset
from ptl.data.order import deal_window, permutation_keys, permute
from ptl.data.prepare import prepare
from ptl.data.sources import Source
from ptl.data.views import ChatView
from ptl.models.heads import lm_loss
from ptl.types import TokenBatch

if TYPE_CHECKING:
    from ptl.data.module import ChatDataModule


@dataclass(frozen=True, kw_only=True)
class PTX:
    """A supervised loss that is added to that of the rewards (InstructGPT, arXiv:2203.02155, equation 2).

    Attributes:
        sources: conversations, as supervised fine-tuning takes them.
        factor: of the mean loss over the trained tokens of a step's conversations, above 0.
        rows: conversations of an optimizer step, over all ranks.

    Raises:
        ValueError: a number out of its range, or no source.
    """

    sources: list[Source]
    factor: float = 1.0
    rows: int = 8

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("model.ptx.sources is empty: give at least one source, for example [{path: chats.jsonl}]")
        if not self.factor > 0:
            raise ValueError(f"model.ptx.factor must be above 0, got {self.factor}; for none remove model.ptx")
        if self.rows < 1:
            raise ValueError(f"model.ptx.rows must be 1 or more, got {self.rows}")


class Mix:
    """The conversations of a ``PTX``, prepared as the data module prepares its own and kept beside them.

    Which conversations a step has is a function of the data's seed and of the step, on any number of ranks.

    Raises:
        ValueError: as ``ptl.data.prepare.prepare``.
    """

    def __init__(self, how: PTX, data: ChatDataModule) -> None:
        self.how, self._layout, self._seed = how, data.layout, data.seed
        view, pad = ChatView(), data.renderer.tokenizer.pad_token_id
        self._prepared = prepare(
            how.sources,
            view=view,
            renderer=data.renderer,
            max_length=data.max_length,
            truncation=data.truncation,
            max_bad_fraction=data.thresholds.max_bad_fraction,
            deduplicate=data.preparation.deduplicate,
            cache_dir=data.preparation.folder,
            num_proc=data.preparation.num_proc,
        )
        self._prepared.audit.check(data.thresholds)
        self._rows = RowDataset(self._prepared.rows, view, data.layout, pad if isinstance(pad, int) else 0)

    def of_step(self, step: int) -> np.ndarray:
        """The prepared rows of an optimizer step, int64 [rows]; all of them come once before any comes again."""
        size = len(self._prepared.lengths)
        places = step * self.how.rows + np.arange(self.how.rows)
        passes = [places[places // size == epoch] for epoch in np.unique(places // size)]
        keys = [permutation_keys(self._seed, int(own[0] // size)) for own in passes]
        return np.concatenate([permute(own % size, size, key) for own, key in zip(passes, keys)])

    def batch(self, step: int, micro: int, rank: int, *, world_size: int, accumulate: int) -> TokenBatch:
        """One rank's micro-batch; its ``window_weight`` is that of the step's conversations over all ranks."""
        rows = self.of_step(step)
        size = -(-len(rows) // (world_size * accumulate))
        lengths, bucket = self._prepared.lengths[rows], self._layout == "padded"
        deal = deal_window(rows, lengths, world_size, accumulate, size, bucket=bucket)
        weight = float(self._prepared.weights[rows].sum(dtype=np.float64))
        return self._rows[MicroBatch(deal.units[micro, rank], ~deal.real[micro, rank], weight)]

    def loss(self, policy: nn.Module, batch: TokenBatch, window_weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What to add to a micro-batch's sum of losses, which is divided by ``window_weight``; and the metric."""
        fused = lm_loss(policy, batch).fused
        weight = batch.window_weight.clamp_min(torch.finfo(torch.float64).tiny)
        factor = self.how.factor * window_weight.double() / weight
        return fused.total * factor.to(fused.total), (fused.nll, fused.weight)
