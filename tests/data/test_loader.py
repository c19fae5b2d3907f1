"""Micro-batches as ranks get them: the prepared rows, exact window weights, the same number of batches everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
import torch

from ptl.data.batches import mask_of
from ptl.data.loader import RowDataset, eval_batches, table_rows, train_batches
from ptl.data.order import Plan
from ptl.data.parts import open_part
from ptl.data.prepare import prepare
from ptl.data.views import ChatView
from tests.data.chats import data_module, documents_of, write_chats

ROWS = 23
FACTORISATIONS = [(1, 1, 8), (1, 4, 2), (2, 2, 2), (2, 1, 4), (4, 2, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chats")


@pytest.fixture(scope="module")
def chats(folder):
    return write_chats(folder / "chats.jsonl", ROWS)


@pytest.fixture(scope="module")
def prepared(chats, tokenizer, model_folder):
    module = data_module(chats, model_folder)
    return prepare(
        module.train_sources,
        view=ChatView(),
        renderer=module.renderer,
        max_length=2048,
        truncation="error",
        cache_dir=module.preparation.folder,
        num_proc=1,
    )


def test_batches_hold_the_prepared_rows(prepared):
    dataset = RowDataset(prepared.rows, ChatView(), "packed", 0)
    part = open_part(prepared, weights=(1.0,), capacity=None, seed=0, split=None)
    for micro in train_batches(Plan(units=ROWS, micro_batch_size=4), part.units, 0, bucket=False):
        batch = dataset[micro]
        rows = prepared.rows[micro.rows.tolist()]
        assert batch.input_ids[0].tolist() == list(itertools.chain(*rows["ids"]))
        kept = [~np.bool_(filler) for filler in micro.filler]
        masks = [
            mask_of(length, spans, weights) * keep
            for length, spans, weights, keep in zip(rows["length"], rows["spans"], rows["span_weights"], kept)
        ]
        assert np.array_equal(batch.loss_mask[0].numpy(), np.concatenate(masks))


def test_table_rows_of_nested_columns():
    table = pa.table(
        {"ids": [[[1, 2], [3]], [[4]]], "flat": pa.array([[1], [2, 3]], pa.list_(pa.int32())), "n": [1, 2]}
    )
    rows = table_rows(table.slice(1))
    assert rows[0]["ids"] == [[4]] and rows[0]["n"] == 2
    assert isinstance(rows[0]["flat"], np.ndarray) and rows[0]["flat"].tolist() == [2, 3]


# ---- law 1 and law 7, ranks simulated ----


@pytest.mark.parametrize(("layout", "capacity"), [("packed", None), ("packed", 96), ("padded", None)])
def test_law_1_window_weight_is_the_sum_over_micro_batches_and_ranks(prepared, layout, capacity):
    """However a step is cut: the weights of its micro-batches add up to the ``window_weight`` that each carries."""
    part = open_part(prepared, weights=(1.0,), capacity=capacity, seed=0, split=None)
    dataset = RowDataset(prepared.rows, ChatView(), layout, 0)
    windows = []
    for world, accumulate, micro in FACTORISATIONS:
        plan = Plan(units=part.units.entries, world_size=world, accumulate=accumulate, micro_batch_size=micro)
        ranks = [
            [dataset[m] for m in train_batches(plan, part.units, rank, bucket=layout == "padded")]
            for rank in range(world)
        ]
        assert {len(rank) for rank in ranks} == {plan.steps * accumulate}
        steps = []
        for step in range(plan.steps):
            window = [b for rank in ranks for b in rank[step * accumulate : (step + 1) * accumulate]]
            weights = {b.window_weight.item() for b in window}
            assert len(weights) == 1
            assert sum(b.loss_mask.sum(dtype=torch.float64).item() for b in window) == pytest.approx(weights.pop())
            steps.append(sorted(itertools.chain(*map(documents_of, window))))
        windows.append(steps)
    assert all(other == windows[0] for other in windows)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("world", [2, 4, 7])
def test_law_7_hostile_counts_give_each_rank_the_same_batches(folder, model_folder, rows, world):
    """Fewer rows than ranks, one row, prime counts; in training and in validation."""
    module = data_module(write_chats(folder / f"hostile-{rows}.jsonl", rows), model_folder)
    module.setup("fit")
    prepared = prepare(
        module.train_sources,
        view=ChatView(),
        renderer=module.renderer,
        max_length=2048,
        truncation="error",
        cache_dir=module.preparation.folder,
        num_proc=1,
    )
    part = open_part(prepared, weights=(1.0,), capacity=None, seed=0, split=None)
    dataset = RowDataset(prepared.rows, ChatView(), "packed", 0)
    everything = sorted(tuple(ids) for ids in prepared.rows["ids"])
    train = Plan(units=rows, world_size=world, accumulate=2, micro_batch_size=2)
    val = Plan(units=rows, world_size=world, micro_batch_size=2, shuffle=False)
    for plan, make in ((train, train_batches), (val, eval_batches)):
        ranks = [[dataset[m] for m in make(plan, part.units, rank, bucket=False)] for rank in range(world)]
        assert {len(batches) for batches in ranks} == {plan.steps * plan.accumulate}
        assert sorted(itertools.chain(*(documents_of(b) for rank in ranks for b in rank))) == everything
        assert all(len(b.sources) == 2 for rank in ranks for b in rank)
        if make is eval_batches:
            assert all(b.window_weight.item() == b.loss_mask.sum().item() for rank in ranks for b in rank)
