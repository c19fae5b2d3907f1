"""From prepared documents to a batch: loss masks as spans, documents packed end to end or padded on the right.

Shape letters: D documents, T tokens of a row of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ptl.types import TokenBatch

Layout = Literal["packed", "padded"]


def spans_of(loss_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runs of equal, non-zero weight in a loss mask: what is stored in place of a weight a token.

    Args:
        loss_mask: float32 [T].

    Returns:
        ``spans`` int32 [2 S], start and end of each run, and ``span_weights`` float32 [S].
    """
    edges = np.flatnonzero(np.diff(loss_mask, prepend=np.float32(0), append=np.float32(0)))
    weights = loss_mask[edges[:-1]] if len(edges) else np.zeros(0, np.float32)
    kept = weights != 0
    spans = np.stack([edges[:-1][kept], edges[1:][kept]], axis=1) if len(edges) else np.zeros((0, 2))
    return spans.reshape(-1).astype(np.int32), weights[kept].astype(np.float32)


def mask_of(length: int, spans: Sequence[int] | np.ndarray, span_weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """The loss mask, float32 [length], that ``spans_of`` took apart."""
    mask = np.zeros(length, np.float32)
    for index, weight in enumerate(span_weights):
        mask[spans[2 * index] : spans[2 * index + 1]] = weight
    return mask


def collate_tokens(
    rows: Sequence[Mapping[str, Any]], *, layout: Layout, pad_id: int, window_weight: float
) -> TokenBatch:
    """One micro-batch.

    Args:
        rows: D documents with ``ids``, ``spans``, ``span_weights``, ``source`` and, where they come from prepared
            rows, their index ``row``.
        layout: ``packed``, one row [1, sum of lengths] without padding, bounds in ``cu_seqlens``; or ``padded``, a
            document a row [D, longest length]. Padding is told by length, never by its id, which may be a real token.
        pad_id: id that fills a padded row; unused by ``packed``.
        window_weight: sum of the loss weights over the optimizer window and all ranks.
    """
    lengths = np.array([len(row["ids"]) for row in rows], np.int64)
    if layout == "packed":
        return _packed(rows, lengths, window_weight)
    shape = (len(rows), int(lengths.max()))
    ids = np.full(shape, pad_id, np.int64)
    mask = np.zeros(shape, np.float32)
    for at, (row, length) in enumerate(zip(rows, lengths.tolist())):
        ids[at, :length] = row["ids"]
        mask[at, :length] = _document_mask(row, length)
    columns = np.arange(shape[1])
    real = columns[None] < lengths[:, None]
    documents = np.where(real, np.arange(len(rows))[:, None], -1)
    trained = np.flatnonzero(mask)
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        loss_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(np.where(real, columns, 0)),
        document_ids=torch.from_numpy(documents),
        sources=_sources(rows),
        window_weight=torch.tensor(window_weight, dtype=torch.float64),
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        rows=_rows(rows),
        trained=torch.from_numpy(trained),
        host_trained=trained,
        host_lengths=lengths,
    )


def _packed(rows: Sequence[Mapping[str, Any]], lengths: np.ndarray, window_weight: float) -> TokenBatch:
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    ids = np.concatenate([np.asarray(row["ids"]) for row in rows]).astype(np.int64)
    mask = np.concatenate([_document_mask(row, length) for row, length in zip(rows, lengths.tolist())])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    trained = np.flatnonzero(mask)
    return TokenBatch(
        input_ids=torch.from_numpy(ids)[None],
        loss_mask=torch.from_numpy(mask)[None],
        position_ids=torch.from_numpy(positions)[None],
        document_ids=torch.from_numpy(np.repeat(np.arange(len(rows)), lengths))[None],
        sources=_sources(rows),
        window_weight=torch.tensor(window_weight, dtype=torch.float64),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        rows=_rows(rows),
        trained=torch.from_numpy(trained),
        host_trained=trained,
        host_lengths=lengths,
    )


def _document_mask(row: Mapping[str, Any], length: int) -> np.ndarray:
    """The loss mask of a document; its first token is no target, whatever the row says: nothing precedes it."""
    mask = mask_of(length, row["spans"], row["span_weights"])
    mask[0] = 0.0
    return mask


def _sources(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([int(row["source"]) for row in rows], dtype=torch.int64)


def _rows(rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
    if not all("row" in row for row in rows):
        return None
    return torch.tensor([int(row["row"]) for row in rows], dtype=torch.int64)
