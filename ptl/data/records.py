"""From a row to a record: one short function a format, each refusing what it cannot read with a named reason.

A row is a dict as a reader gives it. ``parse_row`` is pure: same row, same record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ptl.data.messages import checked_text, kind, parse_content, parse_messages, parse_tools
from ptl.data.sources import BadRow, Source, renamed
from ptl.types import Conversation, Message, Origin, Prompt, Ranking, Record

TEST_KEYS = ("tests", "test_list", "test")
ANSWER_KEYS = ("answer", "ground_truth")
QUESTION_KEYS = ("prompt", "question", "messages")


def parse_row(row: Mapping[str, Any], row_format: str, source: Source, origin: Origin) -> Record:
    """The record a row holds.

    Args:
        row: the row.
        row_format: one of ``sources.FORMATS``.
        source: for its ``columns`` and ``roles``.
        origin: file and line.

    Raises:
        BadRow: the row cannot be read as this format.
    """
    return PARSERS[row_format](renamed(row, source.columns), source, origin)


def _messages(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    return _dialogue(row, "messages", source, origin)


def _sharegpt(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    keys = ("conversations", "conversation", "messages")
    return _dialogue(row, next((key for key in keys if row.get(key) is not None), keys[0]), source, origin)


def _dialogue(row: Mapping[str, Any], key: str, source: Source, origin: Origin) -> Conversation:
    turns = parse_messages(required(row, key, source), key, source.roles)
    messages = _system(row, turns) + turns
    return Conversation(messages=_answered(messages, key), tools=parse_tools(row.get("tools")), origin=origin)


def _alpaca(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    question = _said(row, "instruction", source)
    extra = row.get("input")
    if extra is not None and (text := parse_content(extra, "input")).strip():
        question = f"{question}\n{text}"
    turns: list[Message] = []
    for i, pair in enumerate(row.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("wrong_type", f"history[{i}] is {kind(pair)}; expected [question, answer]")
        turns += _pair(parse_content(pair[0], f"history[{i}][0]"), parse_content(pair[1], f"history[{i}][1]"))
    turns += _pair(question, _said(row, "output", source))
    return Conversation(messages=_system(row, turns) + tuple(turns), origin=origin)


def _prompt_completion(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    """Only the completion is trained: assistant turns of the prompt are its context, unless they say ``train``."""
    prompt = tuple(
        message if message.train is not None or message.role != "assistant" else replace(message, train=0.0)
        for message in _turns(row, "prompt", "user", source)
    )
    completion = _turns(row, "completion", "assistant", source)
    messages = _system(row, prompt) + prompt + _answered(completion, "completion")
    return Conversation(messages=messages, tools=parse_tools(row.get("tools")), origin=origin)


def _text(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    value = required(row, "text", source)
    if not isinstance(value, str):
        raise BadRow("null_content" if value is None else "wrong_type", f"text is {kind(value)}; expected a string")
    if not value.strip():
        raise BadRow("empty_content", "text is blank")
    return Conversation(text=checked_text(value, "text"), origin=origin)


def _ranking(row: Mapping[str, Any], source: Source, origin: Origin) -> Ranking:
    if row.get("completions") is not None:
        answers = required(row, "completions", source)
        if not isinstance(answers, list | tuple):
            raise BadRow("wrong_type", f"completions is {kind(answers)}; expected a list of answers")
        completions = [_as_turns(answer, f"completions[{i}]", "assistant", source) for i, answer in enumerate(answers)]
        ranks = _ranks(row, len(completions))
    else:
        completions = [_turns(row, key, "assistant", source) for key in ("chosen", "rejected")]
        ranks = (1.0, 2.0)
    if row.get("prompt") is not None:
        prompt = _turns(row, "prompt", "user", source)
    else:
        prompt, completions = _shared_prefix(completions)
    for i, completion in enumerate(completions):
        if not completion or completion[-1].role != "assistant":
            raise BadRow("bad_ranking", f"answer {i} does not end with an assistant turn")
    return Ranking(
        prompt=_system(row, prompt) + prompt,
        completions=tuple(completions),
        ranks=ranks,
        tools=parse_tools(row.get("tools")),
        origin=origin,
    )


def _ranks(row: Mapping[str, Any], count: int) -> tuple[float, ...]:
    """Ranks as given (lower is better), or from scores: 1 + how many answers score higher."""
    key = "ranks" if row.get("ranks") is not None else "scores"
    values = row.get(key)
    if not isinstance(values, list | tuple) or len(values) != count or count < 2:
        raise BadRow("bad_ranking", f"{key} is {kind(values)}; expected one number for each of >= 2 answers ({count})")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise BadRow("bad_ranking", f"{key} holds a value that is not a finite number")
    if key == "ranks":
        return tuple(float(value) for value in values)
    return tuple(1.0 + sum(other > value for other in values) for value in values)


def _shared_prefix(
    completions: list[tuple[Message, ...]],
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """Splits whole dialogues into the turns they share and the answers in which they differ."""
    shortest = min(len(turns) for turns in completions)
    shared = 0
    while shared < shortest and all(turns[shared] == completions[0][shared] for turns in completions):
        shared += 1
    prompt = completions[0][:shared]
    if not prompt:
        raise BadRow("missing_key", "the row has no prompt, and its answers share no first turn")
    return prompt, [turns[shared:] for turns in completions]


def _prompt(row: Mapping[str, Any], source: Source, origin: Origin) -> Prompt:
    key = next((key for key in QUESTION_KEYS if row.get(key) is not None), None)
    if key is None:
        raise BadRow("missing_key", f"the row has none of {list(QUESTION_KEYS)}; its keys are {sorted(map(str, row))}")
    turns = _turns(row, key, "user", source)
    if turns[-1].role == "assistant":
        raise BadRow("no_question", f"{key} ends with an assistant turn; expected the turns up to the question")
    answer_key = next((name for name in ANSWER_KEYS if row.get(name) is not None), None)
    test_key = next((name for name in TEST_KEYS if row.get(name) is not None), None)
    meta = {name: row[name] for name in row if name not in (key, answer_key, test_key, "tools", "system")}
    answer = None
    if answer_key is not None:
        answer = _answer(row[answer_key], answer_key)
        if key == "question" and "####" in answer:
            meta["solution"] = answer
            answer = answer.rsplit("####", 1)[1].strip()
    return Prompt(
        messages=_system(row, turns) + turns,
        answer=answer,
        tests=() if test_key is None else _tests(row[test_key], test_key),
        meta=meta,
        tools=parse_tools(row.get("tools")),
        origin=origin,
    )


def _answer(value: Any, at: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("wrong_type", f"{at} is {kind(value)}; expected text or a number")
    return checked_text(str(value), at)


def _tests(value: Any, at: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(test, str) for test in values):
        raise BadRow("wrong_type", f"{at} is {kind(value)}; expected test code, or a list of it")
    return tuple(checked_text(test, at) for test in values)


def required(row: Mapping[str, Any], key: str, source: Source) -> Any:
    """The value of a field that the format needs."""
    if key not in row:
        column = source.columns.get(key)
        name = f"{key} (column {column!r})" if column else key
        raise BadRow("missing_key", f"the row has no {name}; its keys are {sorted(map(str, row))[:20]}")
    return row[key]


def _said(row: Mapping[str, Any], key: str, source: Source) -> str:
    text = parse_content(required(row, key, source), key)
    if not text.strip():
        raise BadRow("empty_content", f"{key} is blank")
    return text


def _turns(row: Mapping[str, Any], key: str, role: str, source: Source) -> tuple[Message, ...]:
    return _as_turns(required(row, key, source), key, role, source)


def _as_turns(value: Any, at: str, role: str, source: Source) -> tuple[Message, ...]:
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


def _pair(question: str, answer: str) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


def _system(row: Mapping[str, Any], turns: tuple[Message, ...] | list[Message]) -> tuple[Message, ...]:
    """The row's ``system`` column as a first turn, where it has one and the turns do not start with their own."""
    value = row.get("system")
    if not isinstance(value, str) or not value.strip() or (turns and turns[0].role in ("system", "developer")):
        return ()
    return (Message(role="system", content=checked_text(value, "system")),)


def _answered(messages: tuple[Message, ...], at: str) -> tuple[Message, ...]:
    if not any(message.role == "assistant" for message in messages):
        raise BadRow("no_assistant", f"{at} has no assistant turn among its {len(messages)}")
    return messages


PARSERS: Mapping[str, Callable[[Mapping[str, Any], Source, Origin], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "ranking": _ranking,
    "prompt": _prompt,
}
