"""A view says what an objective eats: the record it is made from, how that is stored, and the batch it becomes.

A view has no state. Preparation calls ``encode`` once for each row of the data; the loader calls ``collate`` for each
micro-batch. Whatever the view, a stored example has the columns ``length``, ``weight``, ``truncated`` and
``lost_end``, by which rows are packed, weighed and audited.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Features, List, Value

from ptl.data.batches import Layout, collate_tokens, spans_of
from ptl.data.render import Renderer, RenderError, Truncation
from ptl.types import Conversation, Record, TokenBatch, Tokens

Example = dict[str, Any]
"""One document as it is stored, with the columns of its view's ``features``."""


class View(ABC):
    """What an objective eats.

    Attributes:
        record: the record type its sources must hold.
        features: the columns of an example. ``length`` int32, ``weight`` float32 (sum of the loss weights),
            ``truncated`` and ``lost_end`` bool are in every view.
        samples: whether the objective samples answers to the rows, which then are prompts and come as ``PromptBatch``.
        ranks: ranks that share each micro-batch, every one a part of its tokens; each of them is given the whole.
        windows, passes: steps that one rollout's answers are for, and how often they are trained on (``order.Plan``).
    """

    record: ClassVar[type[Record]]
    features: ClassVar[Features]
    samples: bool = False
    ranks: int = 1
    windows: int = 1
    passes: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What of the view's own settings changes its examples; part of the key that prepared rows are kept under."""
        return {}

    @abstractmethod
    def encode(
        self, records: Sequence[Any], renderer: Renderer, max_length: int, truncation: Truncation
    ) -> list[list[Example] | RenderError]:
        """The examples of each record, in order, or why it is refused. A record may make several documents.

        Args:
            records: of type ``record``.
            renderer: turns messages into tokens.
            max_length: most tokens of a document.
            truncation: what to do with a longer one; ``TooLong`` is returned where it cannot be made to fit.
        """

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]], *, layout: Layout, pad_id: int, window_weight: float) -> Any:
        """The batch of one micro-batch's examples, each with its ``source`` besides its own columns."""

    @abstractmethod
    def without_weight(self, row: Mapping[str, Any]) -> Example:
        """The same example with every loss weight 0: what fills a place that has no example."""

    def documents(self, example: Example) -> list[Example]:
        """The texts of an example for a reader's eye: ids with their loss weights, and under ``note`` what they are."""
        return [example]


class ChatView(View):
    """Conversations, or plain text, as documents of tokens with a loss mask; batches are ``TokenBatch``.

    The loss mask is stored as runs of equal weight: ``spans`` holds start and end of each, ``span_weights`` its weight.

    Arguments:
        ranks: as in ``View``.
    """

    record = Conversation
    features = Features(
        {
            "ids": List(Value("int32")),
            "spans": List(Value("int32")),
            "span_weights": List(Value("float32")),
            "length": Value("int32"),
            "weight": Value("float32"),
            "truncated": Value("bool"),
            "lost_end": Value("bool"),
        }
    )

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks

    def encode(
        self, records: Sequence[Conversation], renderer: Renderer, max_length: int, truncation: Truncation
    ) -> list[list[Example] | RenderError]:
        """Renders all records in one tokenizer call, then cuts those that are too long."""
        encoded: list[list[Example] | RenderError] = []
        for record, documents in zip(records, renderer.render_batch(records)):
            if not isinstance(documents, RenderError) and any(len(tokens.ids) > max_length for tokens in documents):
                try:
                    documents = renderer.fit(record, max_length, truncation)
                except RenderError as refusal:
                    documents = refusal
            encoded.append(documents if isinstance(documents, RenderError) else [example_of(t) for t in documents])
        return encoded

    def collate(
        self, rows: Sequence[Mapping[str, Any]], *, layout: Layout, pad_id: int, window_weight: float
    ) -> TokenBatch:
        return collate_tokens(rows, layout=layout, pad_id=pad_id, window_weight=window_weight)

    def without_weight(self, row: Mapping[str, Any]) -> Example:
        return {**row, "spans": np.zeros(0, np.int32), "span_weights": np.zeros(0, np.float32), "weight": 0.0}


def example_of(tokens: Tokens) -> Example:
    """A document as it is stored. Its first token is no target: nothing precedes it."""
    mask = np.array(tokens.loss_mask, np.float32)
    mask[:1] = 0.0
    spans, span_weights = spans_of(mask)
    return {
        "ids": np.asarray(tokens.ids, np.int32),
        "spans": spans,
        "span_weights": span_weights,
        "length": len(tokens.ids),
        "weight": float(mask.sum(dtype=np.float64)),
        "truncated": bool(tokens.truncated),
        "lost_end": bool(tokens.lost_end),
    }
