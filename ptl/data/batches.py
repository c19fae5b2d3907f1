"""From prepared documents to a batch: loss masks as spans, documents packed end to end or padded on the right.

Shape letters: D documents, T tokens of a row of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ptl.types import Documents, TokenBatch

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
    bounds = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    documents = Documents(
        ids=np.concatenate([np.asarray(row["ids"]) for row in rows]).astype(np.int64),
        weights=np.concatenate([_document_mask(row, length) for row, length in zip(rows, lengths.tolist())]),
        bounds=bounds,
        rows=np.array([int(row["row"]) for row in rows], np.int64) if all("row" in row for row in rows) else None,
    )
    places = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    owners = np.repeat(np.arange(len(rows)), lengths)
    real = np.arange(lengths.max()) < lengths[:, None] if layout == "padded" else None
    ids, mask, positions, document_ids = (
        flat[None] if real is None else _padded(flat, real, fill)
        for flat, fill in ((documents.ids, pad_id), (documents.weights, 0.0), (places, 0), (owners, -1))
    )
    trained = np.flatnonzero(mask)
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        loss_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        document_ids=torch.from_numpy(document_ids),
        sources=torch.tensor([int(row["source"]) for row in rows], dtype=torch.int64),
        window_weight=torch.tensor(window_weight, dtype=torch.float64),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)) if real is None else None,
        attention_mask=None if real is None else torch.from_numpy(real.astype(np.int64)),
        rows=None if documents.rows is None else torch.from_numpy(documents.rows),
        trained=torch.from_numpy(trained),
        host_trained=trained,
        host_lengths=lengths,
        documents=documents,
    )


def documents_of(batch: TokenBatch) -> Documents:
    """The documents of a batch on the host; of a batch that does not say them, read once from its device."""
    if batch.documents is not None:
        return batch.documents
    host = batch.on("cpu")
    owners, positions, ids, mask = (
        tensor.flatten().numpy() for tensor in (host.document_ids, host.position_ids, host.input_ids, host.loss_mask)
    )
    real = np.flatnonzero(owners >= 0)
    return Documents(
        ids=ids[real],
        weights=np.where(positions > 0, mask, np.float32(0))[real],
        bounds=np.searchsorted(owners[real], np.arange(len(host.sources) + 1)),
        rows=None if host.rows is None else host.rows.numpy(),
    )


def sent(values: Iterable[Any], device: torch.device) -> list[Any]:
    """Tensors of the host on a device; what is no tensor stays as it is.

    On the way to a GPU they lie in page-locked memory: the host does not wait for what is queued there.
    """
    tensors = (v.pin_memory() if device.type == "cuda" and isinstance(v, Tensor) else v for v in values)
    return [v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in tensors]


def _padded(flat: np.ndarray, real: np.ndarray, fill: float) -> np.ndarray:
    """Values of the real tokens in their places of a grid like ``real``, and ``fill`` in the others."""
    grid = np.full(real.shape, fill, flat.dtype)
    grid[real] = flat
    return grid


def _document_mask(row: Mapping[str, Any], length: int) -> np.ndarray:
    """The loss mask of a document; its first token is no target, whatever the row says: nothing precedes it."""
    mask = mask_of(length, row["spans"], row["span_weights"])
    mask[0] = 0.0
    return mask
