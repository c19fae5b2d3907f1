"""The chat view: what is stored is what was rendered; refused rows stay in their place."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest

from ptl.data.batches import mask_of
from ptl.data.encode import schema_of
from ptl.data.render import Renderer, RenderError, TooLong
from ptl.data.views import ChatView, example_of
from ptl.types import Conversation, Message, Origin, Tokens


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def chat(*turns: str) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[i % 2], content=text) for i, text in enumerate(turns))
    return Conversation(messages=messages, origin=Origin("rows.jsonl", 1))


RECORDS = [
    chat("hello world", "the quick brown fox"),
    chat("What is 2+2?", "The answer is 4.", "Where is Shanghai?", "En Chine."),
    Conversation(text="the lazy dog", origin=Origin("rows.jsonl", 2)),
]


def test_encode_is_what_was_rendered(renderer):
    encoded = ChatView().encode(RECORDS, renderer, 512, "error")
    assert len(encoded) == 3
    for record, examples in zip(RECORDS, encoded):
        assert not isinstance(examples, RenderError)
        documents = renderer.render(record)
        assert len(documents) == len(examples)
        for tokens, example in zip(documents, examples):
            assert np.array_equal(example["ids"], tokens.ids)
            stored = mask_of(example["length"], example["spans"], example["span_weights"])
            assert np.array_equal(stored, tokens.loss_mask)
            assert example["length"] == len(tokens.ids) and example["weight"] == tokens.loss_mask.sum() > 0
            assert example["truncated"] is example["lost_end"] is False


@pytest.mark.parametrize("truncation", ["drop", "error"])
def test_too_long_is_refused_in_its_place(renderer, truncation):
    longest = chat("hello", "the quick brown fox jumps over the lazy dog " * 8)
    encoded = ChatView().encode([RECORDS[0], longest, RECORDS[2]], renderer, 60, truncation)
    assert isinstance(encoded[1], TooLong)
    assert isinstance(encoded[0], list) and isinstance(encoded[2], list)


def test_too_long_is_cut(renderer):
    longest = chat("hello", "the quick brown fox jumps over the lazy dog " * 8)
    whole = ChatView().encode([longest], renderer, 4096, "error")[0]
    limit = 40
    cut = ChatView().encode([longest], renderer, limit, "keep_start")[0]
    assert isinstance(whole, list) and isinstance(cut, list)
    assert cut[0]["length"] == limit and cut[0]["truncated"] and cut[0]["lost_end"]
    assert np.array_equal(cut[0]["ids"], whole[0]["ids"][:limit])


def test_a_row_that_cannot_be_rendered_stays_in_its_place(renderer):
    empty = Conversation(messages=(), origin=Origin("rows.jsonl", 3))
    encoded = ChatView().encode([RECORDS[0], empty, RECORDS[1]], renderer, 512, "error")
    assert [isinstance(entry, RenderError) for entry in encoded] == [False, True, False]


def test_examples_fit_their_columns(renderer):
    encoded = ChatView().encode(RECORDS, renderer, 512, "error")
    examples = [{**example, "source": 0, "line": 1} for examples in encoded for example in examples]  # type: ignore
    table = pa.Table.from_pylist(
        [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in example.items()} for example in examples],
        schema=schema_of(ChatView()),
    )
    assert table.num_rows == 3
    assert set(examples[0]) - {"source", "line"} == set(ChatView.features)


def test_example_of_drops_weight_on_the_first_token():
    example = example_of(Tokens(np.array([1, 2, 3]), np.array([1, 1, 0.5], np.float32), truncated=True))
    assert example["spans"].tolist() == [1, 2, 2, 3] and example["span_weights"].tolist() == [1, 0.5]
    assert example["weight"] == 1.5 and example["truncated"] is True


def test_without_weight_keeps_the_tokens():
    view = ChatView()
    row = {**example_of(Tokens(np.array([1, 2, 3]), np.array([0, 1, 1], np.float32))), "source": 4}
    filler = view.without_weight(row)
    batch = view.collate([row, filler], layout="packed", pad_id=0, window_weight=2.0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 3]]
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0, 0, 0]]
    assert batch.sources.tolist() == [4, 4]
    assert row["weight"] == 2


def test_view_is_picklable():
    assert type(pickle.loads(pickle.dumps(ChatView()))) is ChatView
