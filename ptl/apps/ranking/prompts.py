"""The file to rank, as items: a prompt, its answers, the row they came from. Every bad line is named.

The order in which a person sees the answers is decided here too: blind, fixed for a (seed, annotator, prompt), and
without any state, so that a restarted server shows the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptl.data.messages import checked_text, kind, parse_messages
from ptl.data.sources import BadRow
from ptl.types import Message, Origin

GIVEN_ORDERS = ("ranks", "scores")
"""Keys of a row with an order that somebody else gave. They are left out of a ranked row, which would contradict it."""


@dataclass(frozen=True)
class Item:
    """A prompt and its K >= 2 answers.

    Attributes:
        id: the row's own, else a digest of its prompt and answers.
        row: as it was read; what is written back beside the ranks.
        prompt: the turns before the answers.
        answers: K answers of one or more turns, in the order of the file.
        content: digest of prompt and answers, to notice an id whose answers were changed.
        origin: file and line.
    """

    id: str
    row: Mapping[str, Any]
    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    content: str
    origin: Origin

    def order(self, seed: int, annotator: str) -> tuple[int, ...]:
        """Which answer of the file stands at each place shown. Does not depend on a generator's implementation."""

        def draw(index: int) -> bytes:
            return hashlib.sha256(json.dumps([seed, annotator, self.id, index]).encode()).digest()

        return tuple(sorted(range(len(self.answers)), key=draw))

    def ranked(self, ranks: Sequence[int | None]) -> dict[str, Any]:
        """The row with a rank at each of its answers, in the order of the file.

        Args:
            ranks: K numbers from 1, lower is better, equal is a tie; None for an answer that was not ranked.
        """
        answers = [as_completion(value) for value in self.row["completions"]]
        out = {key: value for key, value in self.row.items() if key not in GIVEN_ORDERS}
        out["completions"] = [{**answer, "rank": rank} for answer, rank in zip(answers, ranks, strict=True)]
        return out


def as_completion(value: Any) -> dict[str, Any]:
    """A completion as an object with ``messages``, however the file writes it."""
    if isinstance(value, str):
        return {"messages": [{"role": "assistant", "content": value}]}
    if isinstance(value, list):
        return {"messages": value}
    if isinstance(value, Mapping) and "messages" not in value and "role" in value:
        return {"messages": [dict(value)]}
    return dict(value)


def content_digest(row: Mapping[str, Any]) -> str:
    """Digest of what a person judges: the prompt and the answers, without their ranks and meta."""
    answers = [as_completion(value)["messages"] for value in row["completions"]]
    text = json.dumps([row.get("system"), row["prompt"], answers], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_items(path: Path) -> list[Item]:
    """The items of a JSONL file, in its order.

    Raises:
        ValueError: a line cannot be ranked, two rows have one id, or there is no row; names the file and line.
        OSError: the file cannot be read.
    """
    items: list[Item] = []
    lines: dict[str, int] = {}
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.isspace():
                continue
            origin = Origin(str(path), number)
            try:
                item = parse_item(json_object(raw), origin)
            except BadRow as bad:
                raise ValueError(f"{origin}: {bad}") from None
            if item.id in lines:
                own = f"id {item.id!r}" if item.row.get("id") is not None else "prompt and answers"
                raise ValueError(f"{origin}: the row has the same {own} as line {lines[item.id]}: give it an id")
            lines[item.id] = number
            items.append(item)
    if not items:
        raise ValueError(f"{path} has no row to rank")
    return items


def json_object(raw: bytes) -> dict[str, Any]:
    """One line of JSONL. Raises ``BadRow``."""
    try:
        row = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow("wrong_encoding", f"byte {error.start} of the line is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadRow("broken_json", f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("broken_json", type(error).__name__) from None
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"the row is {kind(row)}; expected an object with prompt and completions")
    return row


def parse_item(row: Mapping[str, Any], origin: Origin) -> Item:
    """A row as an item. Raises ``BadRow``."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRow("wrong_encoding", "the row has a character that is not UTF-8") from None
    for key in ("prompt", "completions"):
        if row.get(key) is None:
            raise BadRow("missing_key", f"the row has no {key}; its keys are {sorted(map(str, row))[:20]}")
    prompt = _turns(row["prompt"], "prompt", "user")
    if isinstance(row.get("system"), str) and row["system"].strip() and prompt[0].role != "system":
        prompt = (Message(role="system", content=checked_text(row["system"], "system")), *prompt)
    values = row["completions"]
    if not isinstance(values, list) or len(values) < 2:
        got = f"a list of {len(values)}" if isinstance(values, list) else kind(values)
        raise BadRow("bad_ranking", f"completions is {got}; expected a list of two answers or more")
    answers: list[tuple[Message, ...]] = []
    for i, value in enumerate(values):
        at = f"completions[{i}]"
        if not isinstance(value, str | list | Mapping):
            raise BadRow("wrong_type", f"{at} is {kind(value)}; expected text, messages or an object with messages")
        answer = as_completion(value)
        if "messages" not in answer:
            raise BadRow("missing_key", f"{at} has no messages; its keys are {sorted(map(str, answer))[:20]}")
        turns = _turns(answer["messages"], f"{at}.messages", "assistant")
        if turns[-1].role != "assistant":
            raise BadRow("bad_ranking", f"{at} does not end with an assistant turn")
        answers.append(turns)
    content = content_digest(row)
    return Item(_id(row.get("id"), content), row, prompt, tuple(answers), content, origin)


def _id(value: Any, content: str) -> str:
    if value is None:
        return content
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise BadRow("wrong_type", f"id is {kind(value)}; expected a text or an integer")
    return checked_text(str(value), "id")


def _turns(value: Any, at: str, role: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty_content", f"{at} is blank")
        return (Message(role=role, content=checked_text(value, at)),)
    return parse_messages([value] if isinstance(value, Mapping) else value, at, {})
