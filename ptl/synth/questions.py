"""What a model is asked: the prompts of a data set, rendered as in training, in batches of similar length."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptl.data.readers import rows_of
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
        known: what else its row says, for who asks.
    """

    number: int
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    origin: Origin
    ids: list[int]
    known: Mapping[str, Any] = field(default_factory=dict)


Turns = tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...], Mapping[str, Any]]
"""Messages, tools and what else is known of a question."""
Reader = Callable[[Mapping[str, Any], int, Origin], Turns]
"""Reads the question in a row of the source at a place among them, or raises ``BadRow``."""


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

    def read(row: Mapping[str, Any], place: int, origin: Origin) -> Turns:
        record = parse_row(row, formats[place], sources[place], origin)
        return _asked(record), record.tools, {}

    return read_questions(sources, read, renderer, refuse, system=system)


def read_questions(
    sources: Sequence[Source],
    read: Reader,
    renderer: Renderer,
    refuse: Callable[[BadRow | RenderError, Origin], None],
    *,
    system: str | None = None,
) -> Iterator[Question]:
    """``questions`` of rows that are no records of training: ``read`` finds the question in each."""
    number = 0
    for place, source in enumerate(sources):
        for origin, row in rows_of(source):
            number += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                messages, tools, known = read(row, place, origin)
                if system and messages[0].role not in ("system", "developer"):
                    messages = (Message(role="system", content=system), *messages)
                ids = renderer.prompt(messages, tools)
            except (BadRow, RenderError) as error:
                refuse(error, origin)
                continue
            where = {"number": number - 1, "origin": origin}
            yield Question(messages=messages, tools=tools, ids=ids, known=known, **where)


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


def message_row(message: Message) -> dict[str, Any]:
    """A message as a row of data has it, with the weight of its turn where it has its own."""
    return message.as_dict() | ({} if message.train is None else {"train": message.train})


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
