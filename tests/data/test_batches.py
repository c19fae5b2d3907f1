"""Collation: positions restart, document starts are no targets, padding is told by length and never by id."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device

from ptl.data.batches import collate_tokens, documents_of, mask_of, spans_of
from ptl.models.heads import shifted_targets
from ptl.types import TokenBatch


def row(ids, mask, source=0):
    spans, weights = spans_of(np.array(mask, np.float32))
    return {"ids": np.array(ids, np.int32), "spans": spans, "span_weights": weights, "source": source}


ROWS = [
    row([5, 6, 7, 8], [0, 0, 1, 1], source=2),
    row([9, 10], [0, 0.5], source=0),
    row([11, 12, 13], [0, 1, 0.25], source=1),
]


@pytest.mark.parametrize("seed", range(20))
def test_spans_and_mask_are_inverse(seed):
    rng = np.random.default_rng(seed)
    mask = rng.choice(np.array([0, 1, 0.5], np.float32), int(rng.integers(1, 40)))
    spans, weights = spans_of(mask)
    assert spans.dtype == np.int32 and weights.dtype == np.float32
    assert len(spans) == 2 * len(weights) and (weights != 0).all()
    assert np.array_equal(mask_of(len(mask), spans, weights), mask)


def test_spans_are_maximal_runs():
    spans, weights = spans_of(np.array([0, 1, 1, 0.5, 0, 0, 1], np.float32))
    assert spans.tolist() == [1, 3, 3, 4, 6, 7] and weights.tolist() == [1, 0.5, 1]
    assert [part.tolist() for part in spans_of(np.zeros(5, np.float32))] == [[], []]


def test_packed():
    batch = collate_tokens(ROWS, layout="packed", pad_id=0, window_weight=7.5)
    assert isinstance(batch, TokenBatch) and batch.attention_mask is None
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1, 0, 0.5, 0, 1, 0.25]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 4, 6, 9]
    assert batch.sources.tolist() == [2, 0, 1]
    assert batch.window_weight.item() == 7.5 and batch.window_weight.shape == ()


def test_padded():
    batch = collate_tokens(ROWS, layout="padded", pad_id=3, window_weight=1.0)
    assert batch.cu_seqlens is None and batch.attention_mask is not None
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 3, 3], [11, 12, 13, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1], [0, 0.5, 0, 0], [0, 1, 0.25, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0], [0, 1, 2, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1], [2, 2, 2, -1]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_types(layout):
    batch = collate_tokens(ROWS, layout=layout, pad_id=0, window_weight=1.0)
    for name in ("input_ids", "position_ids", "document_ids", "sources"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.loss_mask.dtype == torch.float32 and batch.window_weight.dtype == torch.float64
    if batch.cu_seqlens is not None:
        assert batch.cu_seqlens.dtype == torch.int32
    if batch.attention_mask is not None:
        assert batch.attention_mask.dtype == torch.int64


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_what_the_host_knows_is_what_the_tensors_say(layout):
    first = {"ids": np.array([1, 2, 3], np.int32), "spans": [0, 3], "span_weights": [1.0], "source": 0}
    for rows in (ROWS, [{**first, "row": 7}, {**first, "row": 2}], [row([4, 5], [0, 0])], [row([4], [0])]):
        batch = collate_tokens(rows, layout=layout, pad_id=0, window_weight=1.0)
        read = batch._replace(trained=None, host_trained=None, host_lengths=None)
        assert batch.trained is not None and batch.host_trained is not None and batch.host_lengths is not None
        assert batch.trained.dtype == torch.int64 and batch.trained.tolist() == batch.host_trained.tolist()
        for known, asked in zip(shifted_targets(batch), shifted_targets(read), strict=True):
            assert known.dtype == asked.dtype and torch.equal(known, asked)
        assert batch.host_lengths.tolist() == [len(one["ids"]) for one in rows]
        assert batch.documents is not None
        for held, found in zip(batch.documents, documents_of(batch._replace(documents=None)), strict=True):
            assert (held is None) == (found is None)
            if held is not None and found is not None:
                assert np.array_equal(held, found) and held.dtype == found.dtype
        moved = move_data_to_device(batch, torch.device("cpu"))
        for there in (batch.on("cpu"), moved):
            assert isinstance(there, TokenBatch) and isinstance(there.host_lengths, np.ndarray)
            assert torch.equal(there.input_ids, batch.input_ids)
            assert there.documents is not None and there.documents.ids is batch.documents.ids


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_trap_sft_2_document_start_is_no_target(layout):
    """A stored row that claims weight on its first token must not make it a target of the document before it."""
    bad = {"ids": np.array([1, 2, 3], np.int32), "spans": [0, 3], "span_weights": [1.0], "source": 0}
    batch = collate_tokens([ROWS[0], bad, bad], layout=layout, pad_id=0, window_weight=1.0)
    starts = (batch.position_ids == 0) & (batch.document_ids >= 0)
    assert int(starts.sum()) == 3
    assert (batch.loss_mask[starts] == 0).all()
    assert batch.loss_mask.sum() == 2 + 2 + 2


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_trap_sft_6_pad_is_eos(layout):
    """With PAD equal to EOS the real EOS keeps its weight and its attention, and padding gets neither."""
    eos = 2
    rows = [row([7, 8, eos], [0, 1, 1]), row([7, eos], [0, 1]), row([eos, eos, eos, eos, eos], [0, 0, 1, 1, 1])]
    batch = collate_tokens(rows, layout=layout, pad_id=eos, window_weight=1.0)
    trained = batch.input_ids[batch.loss_mask > 0]
    assert int((trained == eos).sum()) == 1 + 1 + 3
    assert float(batch.loss_mask.sum()) == 6
    if batch.attention_mask is not None:
        assert batch.attention_mask.sum(1).tolist() == [3, 2, 5]
        assert (batch.loss_mask[batch.attention_mask == 0] == 0).all()
