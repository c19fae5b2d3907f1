"""Rows that say a question and the answers that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ptl.data.fields import system_turn, turns_of
from ptl.data.messages import checked_text, kind, parse_tools
from ptl.data.records import QUESTION_KEYS, parse_row
from ptl.data.sources import RECORD_OF, BadRow, Source, format_of, renamed
from ptl.synth.questions import Reader, Turns
from ptl.types import Conversation, Message, Origin

ANSWERS = ("answers", "answer", "ground_truth")
"""Keys of the accepted answers, the first that is there: text, a number, or a list of these."""


def reader(sources: Sequence[Source]) -> Reader:
    """Reads ``question`` or ``prompt`` with ``answers`` or ``answer``; of a chat, its last answer is the accepted one.

    A chat may list accepted answers in ``answers``, on its own or in ``meta``. A text in ``source`` is the question's
    label, else the label of the file is.
    """

    def read(row: Mapping[str, Any], place: int, origin: Origin) -> Turns:
        source = sources[place]
        row = renamed(row, source.columns)
        label = row.get("source")
        known: dict[str, Any] = {"source": label if isinstance(label, str) and label.strip() else source.label}
        row_format = source.format if source.format != "auto" else format_of(row)
        meta = row.get("meta")
        listed = _listed(row) or (_listed(meta) if isinstance(meta, Mapping) else None)
        if row_format is not None and row_format != "text" and RECORD_OF[row_format] is Conversation:
            record = parse_row(row, row_format, Source(path=source.path, roles=source.roles), origin)
            assert isinstance(record, Conversation)
            messages, last = _up_to_answer(record.messages)
            return messages, record.tools, {"answers": listed or [last.content], **known}
        key = next((key for key in QUESTION_KEYS if row.get(key) is not None), None)
        if key is None:
            keys = sorted(map(str, row))
            raise BadRow("missing_key", f"the row has none of {list(QUESTION_KEYS)}; its keys are {keys[:20]}")
        turns = turns_of(row, key, "user", source)
        if turns[-1].role == "assistant":
            raise BadRow("no_question", f"{key} ends with an assistant turn; expected the turns up to the question")
        if not listed:
            raise BadRow("no_answer", f"the row has no accepted answer: expected one of {list(ANSWERS)}")
        return system_turn(row, turns) + turns, parse_tools(row.get("tools")), {"answers": listed, **known}

    return read


def held_out_reader() -> Reader:
    """Reads the rows of a held-out file as ``ptl synth idk`` writes it, with what the base model knew."""

    def read(row: Mapping[str, Any], place: int, origin: Origin) -> Turns:
        names = ("prompt", "answers", "source", "decision", "k", "n")
        if missing := [name for name in names if name not in row]:
            raise BadRow("missing_key", f"the row has no {missing[0]}: give the held-out file of `ptl synth idk`")
        turns = turns_of(row, "prompt", "user", Source(path=origin.file))
        known = {"answers": _texts(row["answers"], "answers"), "source": str(row["source"])}
        known |= {"decision": row["decision"], "base": {"k": row["k"], "n": row["n"]}}
        return turns, parse_tools(row.get("tools")), known

    return read


def _up_to_answer(messages: Sequence[Message]) -> tuple[tuple[Message, ...], Message]:
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last < 1:
        raise BadRow("no_question", "there is no assistant turn after another one, so nothing to answer")
    return tuple(messages[:last]), messages[last]


def _listed(row: Mapping[str, Any]) -> list[str] | None:
    key = next((key for key in ANSWERS if row.get(key) is not None), None)
    return None if key is None else _texts(row[key], key)


def _texts(value: Any, at: str) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    texts = []
    for each in values:
        if not isinstance(each, str | int | float):
            raise BadRow("wrong_type", f"{at} holds {kind(each)}; expected text, a number, or a list of these")
        text = str(each).lower() if isinstance(each, bool) else checked_text(str(each), at)
        if text.strip():
            texts.append(text)
    return texts
