"""Fields of a row that several formats share: text, turns and a system text, each checked or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptl.data.messages import checked_text, parse_content, parse_messages
from ptl.data.sources import BadRow, Source
from ptl.types import Message


def required(row: Mapping[str, Any], key: str, source: Source) -> Any:
    """The value of a field that the format needs."""
    if key not in row:
        column = source.columns.get(key)
        name = f"{key} (column {column!r})" if column else key
        raise BadRow("missing_key", f"the row has no {name}; its keys are {sorted(map(str, row))[:20]}")
    return row[key]


def rate_of(value: Any) -> float | None:
    """A pass rate, a number from 0 to 1 or its text; None for anything else."""
    try:
        rate = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return rate if rate is not None and 0.0 <= rate <= 1.0 else None


def said(row: Mapping[str, Any], key: str, source: Source) -> str:
    """The text of a field, which is not blank."""
    text = parse_content(required(row, key, source), key)
    if not text.strip():
        raise BadRow("empty_content", f"{key} is blank")
    return text


def turns_of(row: Mapping[str, Any], key: str, role: str, source: Source) -> tuple[Message, ...]:
    """The turns of a field, as ``as_turns``."""
    return as_turns(required(row, key, source), key, role, source)


def as_turns(value: Any, at: str, role: str, source: Source) -> tuple[Message, ...]:
    """Text becomes one turn of ``role``; a message or a list of them is read as it is."""
    if isinstance(value, Mapping):
        value = [value]
    if value is None:
        raise BadRow("null_content", f"{at} is null; expected text or messages")
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_content", f"{at} is blank")
        return (Message(role=role, content=checked_text(value, at)),)
    return parse_messages(value, at, source.roles)


def system_turn(row: Mapping[str, Any], turns: tuple[Message, ...] | list[Message]) -> tuple[Message, ...]:
    """The row's ``system`` column as a first turn, where it has one and the turns do not start with their own."""
    value = row.get("system")
    if not isinstance(value, str) or not value.strip() or (turns and turns[0].role in ("system", "developer")):
        return ()
    return (Message(role="system", content=checked_text(value, "system")),)
