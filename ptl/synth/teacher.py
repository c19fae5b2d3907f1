"""Runs a teacher over prepared rows and writes what it says of every trained token into a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ptl.data.batches import Layout, collate_tokens
from ptl.data.contents import examples
from ptl.data.prepare import Prepared
from ptl.data.teacher_writer import CacheWriter
from ptl.rollout.sampling import draw, uniforms
from ptl.synth.distributions import counted, entropy, log_distributions, top_k, usable
from ptl.types import TokenBatch

SMALL_IDS = 1 << 16
"""Vocabularies up to this size have ids of two bytes."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a teacher reads rows.

    Attributes:
        model: in eval mode.
        prepared: the rows.
        layout: of the batches.
        batch_tokens: most tokens of a batch, padding counted; a longer document is a batch of its own.
    """

    model: nn.Module
    prepared: Prepared
    layout: Layout = "packed"
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"--batch-tokens must be 1 or more, got {self.batch_tokens}")

    def batches(self, begin: int, end: int) -> Iterator[tuple[TokenBatch, list[int]]]:
        """The rows from ``begin`` to ``end``, longest first, and which rows each batch holds, in its order."""
        rows = sorted(examples(self.prepared, begin, end), key=lambda row: (-len(row["ids"]), row["row"]))
        device = next(self.model.parameters()).device
        for group in grouped([len(row["ids"]) for row in rows], self.batch_tokens):
            members = [rows[index] for index in group]
            batch = collate_tokens(members, layout=self.layout, pad_id=0, window_weight=0.0)
            yield batch.on(device), [member["row"] for member in members]


def grouped(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of falling lengths in groups of at most ``tokens``, each member counted as long as the group's first."""
    group: list[int] = []
    for index in range(len(lengths)):
        if group and lengths[group[0]] * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@torch.inference_mode()
def write_shard(reading: Reading, writer: CacheWriter, index: int) -> int:
    """Makes one shard of a cache; returns the tokens for which the teacher gave no numbers."""
    plan, (begin, end) = writer.plan, writer.span(index)
    base = int(writer.rows.offsets[begin])
    kind = TopK if plan.mode == "topk" else Sample
    kept = kind(int(writer.rows.offsets[end]) - base, plan.k, plan.vocab)
    skipped = 0
    for batch, rows in reading.batches(begin, end):
        starts, ends = writer.rows.offsets[rows] - base, writer.rows.offsets[[row + 1 for row in rows]] - base
        places = np.concatenate([np.arange(start, stop) for start, stop in zip(starts.tolist(), ends.tolist())])
        u = None
        if plan.mode == "sample":
            counts = (ends - starts).tolist()
            u = torch.cat([uniforms(plan.seed, row, count, plan.k) for row, count in zip(rows, counts)])
        done = 0
        for logp in log_distributions(reading.model, batch, vocab=plan.vocab, temperature=plan.temperature):
            good = usable(logp)
            skipped += int((~good).sum())
            here = slice(done, done + len(logp))
            # An even row stands in for one of NaN, whose entries are taken out again.
            kept.add(places[here], logp.where(good[:, None], 0.0), good, None if u is None else u[here])
            done += len(logp)
        if done != len(places):
            raise RuntimeError(f"{done} trained tokens in a batch whose rows have {len(places)}")
    writer.write(index, kept.tensors(), skipped)
    return skipped


class TopK:
    """The entries of a shard's tokens in mode ``topk``; see ``ptl.data.teacher_cache``."""

    def __init__(self, tokens: int, k: int, vocab: int) -> None:
        self.k = k
        self.ids = np.zeros((tokens, k), np.uint16 if vocab <= SMALL_IDS else np.int32)
        self.logprobs = np.full((tokens, k), -np.inf, np.float16)
        self.tail = np.full(tokens, -np.inf, np.float32)
        self.entropy = np.zeros(tokens, np.float32)

    def add(self, places: np.ndarray, logp: torch.Tensor, good: torch.Tensor, u: torch.Tensor | None) -> None:
        """Puts the tokens of ``logp`` [n, V] at their places; those that are not good stay without mass."""
        kept, spread, good_places = top_k(logp, self.k), entropy(logp), good.cpu().numpy()
        places = places[good_places]
        self.ids[places] = kept.ids.cpu().numpy()[good_places]
        self.logprobs[places] = kept.logprobs.cpu().numpy()[good_places]
        self.tail[places] = kept.tail.cpu().numpy()[good_places]
        self.entropy[places] = spread.cpu().numpy()[good_places]

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the shard."""
        return {"ids": self.ids, "logprobs": self.logprobs, "tail": self.tail, "entropy": self.entropy}


class Sample:
    """The entries of a shard's tokens in mode ``sample``, of as many distinct ids as were drawn."""

    def __init__(self, tokens: int, k: int, vocab: int) -> None:
        self.dtype: Any = np.uint16 if vocab <= SMALL_IDS else np.int32
        self.distinct = np.zeros(tokens, np.int64)
        self.entropy = np.zeros(tokens, np.float32)
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, places: np.ndarray, logp: torch.Tensor, good: torch.Tensor, u: torch.Tensor | None) -> None:
        """Draws for the tokens of ``logp`` [n, V] by their numbers ``u`` [n, draws]."""
        if u is None:
            raise ValueError("mode sample needs uniform numbers")
        chosen = good.cpu().numpy()
        drawn = draw(logp, u).cpu().numpy()[chosen]
        self.entropy[places[chosen]] = entropy(logp).cpu().numpy()[chosen]
        distinct, ids, counts = counted(drawn)
        self.distinct[places[chosen]] = distinct
        self.parts.append((np.repeat(places[chosen], distinct), ids.astype(self.dtype), counts.astype(np.uint16)))

    def tensors(self) -> dict[str, np.ndarray]:
        """The tensors of the shard."""
        starts = np.zeros(len(self.distinct) + 1, np.int32)
        np.cumsum(self.distinct, out=starts[1:])
        places, ids, counts = (np.concatenate([part[i] for part in self.parts]) for i in range(3))
        order = np.argsort(places, kind="stable")
        return {"starts": starts, "ids": ids[order], "counts": counts[order], "entropy": self.entropy}
