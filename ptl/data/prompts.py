"""Prompts whose answers are sampled and judged: rendered up to where the answer begins, with what a judge needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from datasets import Features, List, Value

from ptl.data.batches import Layout
from ptl.data.fields import rate_of
from ptl.data.render import Renderer, RenderError, TooLong, Truncation
from ptl.data.truncation import exchanges
from ptl.data.views import Example, View
from ptl.types import Message, Origin, Prompt, PromptBatch


class PromptView(View):
    """Prompts; batches are ``PromptBatch``, which names them, and ``record_of`` gives them back whole.

    Arguments:
        room: most tokens of an answer. A prompt is too long when it leaves less within ``data.max_length``.
        windows: optimizer steps that one rollout's answers are for.
        passes: how often those steps are walked.
    """

    record = Prompt
    samples = True
    features = Features(
        {
            "ids": List(Value("int32")),
            "prompt": Value("string"),
            "pass_rate": Value("float32"),  # null where the row has none
            "length": Value("int32"),
            "weight": Value("float32"),
            "truncated": Value("bool"),
            "lost_end": Value("bool"),
        }
    )

    def __init__(self, *, room: int, windows: int = 1, passes: int = 1) -> None:
        self.room, self.windows, self.passes = room, windows, passes

    @property
    def settings(self) -> dict[str, Any]:
        return {"room": self.room}

    def encode(
        self, records: Sequence[Prompt], renderer: Renderer, max_length: int, truncation: Truncation
    ) -> list[list[Example] | RenderError]:
        encoded: list[list[Example] | RenderError] = []
        for record in records:
            try:
                encoded.append([self._example(record, renderer, max_length, truncation)])
            except RenderError as refusal:
                encoded.append(refusal)
        return encoded

    def _example(self, record: Prompt, renderer: Renderer, max_length: int, truncation: Truncation) -> Example:
        most, messages = max_length - self.room, record.messages
        ids = renderer.prompt(messages, record.tools)
        longest = len(ids)
        head, starts = exchanges(messages)
        dropped = 1
        while len(ids) > most and truncation == "drop_oldest_turns" and dropped < len(starts):
            messages = record.messages[:head] + record.messages[starts[dropped] :]
            ids = renderer.prompt(messages, record.tools)
            dropped += 1
        if len(ids) > most:
            raise TooLong(
                "too_long",
                f"{longest} tokens, and max_length {max_length} leaves {most} to a prompt beside max_new_tokens "
                f"{self.room}; raise data.max_length, or set truncation to drop or drop_oldest_turns",
            )
        return {
            "ids": np.asarray(ids, np.int32),
            "prompt": written(replace(record, messages=messages)),
            "pass_rate": rate_of(record.meta.get("pass_rate")),
            "length": len(ids),
            "weight": 1.0,
            "truncated": len(messages) < len(record.messages),
            "lost_end": False,
        }

    def collate(
        self, rows: Sequence[Mapping[str, Any]], *, layout: Layout, pad_id: int, window_weight: float
    ) -> PromptBatch:
        """The prompts of an evaluation; their draws are named by their rows."""
        numbers = np.array([row["row"] for row in rows], np.int64)
        return PromptBatch(numbers, numbers, np.array([row["weight"] > 0 for row in rows], bool))

    def without_weight(self, row: Mapping[str, Any]) -> Example:
        return {**row, "weight": 0.0}

    def documents(self, example: Example) -> list[Example]:
        """The prompt, of which nothing is trained, with what it expects."""
        record = record_of(example["prompt"])
        note = f"answer {record.answer!r}" if record.answer is not None else f"{len(record.tests)} tests"
        return [{**example, "spans": np.zeros(0, np.int32), "span_weights": np.zeros(0, np.float32), "note": note}]


def written(record: Prompt) -> str:
    """A prompt as JSON text, which ``record_of`` reads back."""
    messages = [message.as_dict() for message in record.messages]
    fields = {"answer": record.answer, "tests": record.tests, "meta": record.meta, "tools": record.tools}
    return json.dumps({"messages": messages, **fields, "origin": asdict(record.origin)}, default=str)


def record_of(text: str) -> Prompt:
    """The prompt that ``written`` put down."""
    fields = json.loads(text)
    messages = []
    for message in fields.pop("messages"):
        reasoning, calls = message.pop("reasoning_content", None), tuple(message.pop("tool_calls", ()))
        messages.append(Message(reasoning=reasoning, tool_calls=calls, **message))
    tests, tools, origin = tuple(fields.pop("tests")), tuple(fields.pop("tools")), Origin(**fields.pop("origin"))
    return Prompt(messages=tuple(messages), tests=tests, tools=tools, origin=origin, **fields)
