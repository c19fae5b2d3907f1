"""What a model is asked: the prompts of a data set, rendered as in training, in batches of similar length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptl.data.files import resolve
from ptl.data.readers import blocks
from ptl.data.records import parse_row
from ptl.data.render import Renderer, RenderError, stop_token_ids
from ptl.data.sources import BadRow, Source
from ptl.synth.teacher import grouped
from ptl.types import Message, Origin, Prompt, Ranking, Record

WINDOW = 1024
"""Questions that are sorted by length at a time."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A dialogue up to the answer that is wanted.

    Attributes:
        number: of the row, from 0, over all sources.
        messages: the turns before the answer.
        tools: that the answer may call.
        origin: file and line.
        ids: the rendered prompt.
    """

    number: int
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    origin: Origin
    ids: list[int]


def questions(
    sources: Sequence[Source],
    formats: Sequence[str],
    renderer: Renderer,
    refuse: Callable[[BadRow | RenderError, Origin], None],
    *,
    system: str | None = None,
) -> Iterator[Question]:
    """The questions of all sources, in order.

    Args:
        sources: where the rows are.
        formats: of each source's rows.
        renderer: renders the prompts.
        refuse: called with why for each row that has no question.
        system: text of a system turn for the prompts that have none.
    """
    number = 0
    for source, row_format in zip(sources, formats):
        for block in blocks(source, files=resolve(source)):
            for line, row in block.rows():
                number += 1
                origin = Origin(block.file, line)
                try:
                    if isinstance(row, BadRow):
                        raise row
                    record = parse_row(row, row_format, source, origin)
                    messages = _asked(record)
                    if system and messages[0].role not in ("system", "developer"):
                        messages = (Message(role="system", content=system), *messages)
                    ids = renderer.prompt(messages, record.tools)
                except (BadRow, RenderError) as error:
                    refuse(error, origin)
                    continue
                yield Question(number=number - 1, messages=messages, tools=record.tools, origin=origin, ids=ids)


def _asked(record: Record) -> tuple[Message, ...]:
    """The turns before the answer: of a conversation, those before its last answer."""
    if isinstance(record, Prompt):
        return record.messages
    if isinstance(record, Ranking):
        return record.prompt
    last = max((i for i, message in enumerate(record.messages) if message.role == "assistant"), default=-1)
    if last < 1:
        raise BadRow("no_question", "there is no assistant turn after another one, so nothing to answer")
    return record.messages[:last]


def batches(
    asked: Iterable[Question], *, room: int, max_new_tokens: int, batch_tokens: int, answers: int = 1
) -> Iterator[list[tuple[Question, int]]]:
    """Questions in batches of similar length, each with the most ids that its answer may have; 0 or less is no room.

    Args:
        asked: the questions.
        room: positions that the model was made for, see ``context_length``.
        max_new_tokens: most ids of an answer.
        batch_tokens: most ids of a batch, prompts with room for their answers; one question may have more.
        answers: to each question.
    """
    rest = iter(asked)
    for window in iter(lambda: list(itertools.islice(rest, WINDOW)), []):
        window.sort(key=lambda question: (-len(question.ids), question.number))
        limits = [min(max_new_tokens, room - len(question.ids)) for question in window]
        sizes = [answers * (len(question.ids) + max(0, limit)) for question, limit in zip(window, limits)]
        for group in grouped(sizes, batch_tokens):
            yield [(window[index], limits[index]) for index in group]


def ends(model: Any, renderer: Renderer) -> list[int]:
    """The ids that end an answer: the template's, the tokenizer's and those at which the model itself stops."""
    return stop_token_ids(renderer, getattr(getattr(model, "generation_config", None), "eos_token_id", None))


def context_length(model: Any) -> int:
    """Positions that the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
