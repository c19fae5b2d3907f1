"""From a row to a record: one short function a format, each refusing what it cannot read with a named reason.

A row is a dict, or the ``BadRow`` that a reader gives in its place. ``parse_row`` is pure: same row, same record.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ptl.data.fields import rate_of, required, said, system_turn, turns_of
from ptl.data.messages import checked_text, kind, parse_content, parse_messages, parse_tools
from ptl.data.rankings import parse_ranking
from ptl.data.sources import BadRow, LeftOut, Source, renamed
from ptl.rewards.code import unit_tests_of
from ptl.rewards.sandbox.asserts import WRAPPERS, ConversionError
from ptl.types import Conversation, Message, Origin, Prompt, Record

TEST_KEYS = ("tests", "test_list", "test")
ANSWER_KEYS = ("answer", "ground_truth")
QUESTION_KEYS = ("prompt", "question", "problem", "messages", "text")


def parse_row(row: Mapping[str, Any] | BadRow, row_format: str, source: Source, origin: Origin) -> Record:
    """The record a row holds.

    Args:
        row: the row as a reader gives it.
        row_format: one of ``sources.FORMATS``.
        source: for its ``columns``, ``roles`` and ``pass_rate``.
        origin: file and line.

    Raises:
        BadRow: the row itself, or it cannot be read as this format.
        LeftOut: its ``pass_rate`` is not one that the source wants.
    """
    if isinstance(row, BadRow):
        raise row
    row = renamed(row, source.columns)
    if source.pass_rate is not None:
        _check_pass_rate(row, source, *source.pass_rate)
    return PARSERS[row_format](row, source, origin)


def row_of(prompt: Prompt) -> dict[str, Any]:
    """A row that format ``prompt`` reads as this prompt, whatever row it came from."""
    row = {**prompt.meta, "prompt": [message.as_dict() for message in prompt.messages]}
    if prompt.answer is not None:
        row["answer"] = prompt.answer
    if prompt.tests:
        row["tests"] = list(prompt.tests)
    if prompt.tools:
        row["tools"] = [dict(tool) for tool in prompt.tools]
    return row


def _check_pass_rate(row: Mapping[str, Any], source: Source, low: float, high: float) -> None:
    value = required(row, "pass_rate", source)
    rate = rate_of(value)
    if rate is None:
        raise BadRow("wrong_type", f"pass_rate is {kind(value)}; expected a number from 0 to 1")
    if not low <= rate <= high:
        raise LeftOut("pass_rate", f"pass_rate is {rate:g}, outside of {low:g} to {high:g}")


def _messages(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    return _dialogue(row, "messages", source, origin)


def _sharegpt(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    keys = ("conversations", "conversation", "messages")
    return _dialogue(row, next((key for key in keys if row.get(key) is not None), keys[0]), source, origin)


def _dialogue(row: Mapping[str, Any], key: str, source: Source, origin: Origin) -> Conversation:
    turns = parse_messages(required(row, key, source), key, source.roles)
    messages = system_turn(row, turns) + turns
    return Conversation(messages=_answered(messages, key), tools=parse_tools(row.get("tools")), origin=origin)


def _alpaca(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    question = said(row, "instruction", source)
    extra = row.get("input")
    if extra is not None and (text := parse_content(extra, "input")).strip():
        question = f"{question}\n{text}"
    turns: list[Message] = []
    for i, pair in enumerate(row.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("wrong_type", f"history[{i}] is {kind(pair)}; expected [question, answer]")
        turns += _pair(parse_content(pair[0], f"history[{i}][0]"), parse_content(pair[1], f"history[{i}][1]"))
    turns += _pair(question, said(row, "output", source))
    return Conversation(messages=system_turn(row, turns) + tuple(turns), origin=origin)


def _prompt_completion(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    """Only the completion is trained: assistant turns of the prompt are its context, unless they say ``train``."""
    prompt = tuple(
        message if message.train is not None or message.role != "assistant" else replace(message, train=0.0)
        for message in turns_of(row, "prompt", "user", source)
    )
    completion = turns_of(row, "completion", "assistant", source)
    messages = system_turn(row, prompt) + prompt + _answered(completion, "completion")
    return Conversation(messages=messages, tools=parse_tools(row.get("tools")), origin=origin)


def _text(row: Mapping[str, Any], source: Source, origin: Origin) -> Conversation:
    value = required(row, "text", source)
    if not isinstance(value, str):
        raise BadRow("null_content" if value is None else "wrong_type", f"text is {kind(value)}; expected a string")
    if not value.strip():
        raise BadRow("empty_content", "text is blank")
    return Conversation(text=checked_text(value, "text"), origin=origin)


def _prompt(row: Mapping[str, Any], source: Source, origin: Origin) -> Prompt:
    key = next((key for key in QUESTION_KEYS if row.get(key) is not None), None)
    if key is None:
        raise BadRow("missing_key", f"the row has none of {list(QUESTION_KEYS)}; its keys are {sorted(map(str, row))}")
    turns = turns_of(row, key, "user", source)
    if turns[-1].role == "assistant":
        raise BadRow("no_question", f"{key} ends with an assistant turn; expected the turns up to the question")
    answer_key = next((name for name in ANSWER_KEYS if row.get(name) is not None), None)
    test_key = next((name for name in TEST_KEYS if row.get(name) is not None), None)
    meta = {name: row[name] for name in row if name not in (key, answer_key, test_key, "tools", "system")}
    answer = None
    if answer_key is not None:
        answer = _answer(row[answer_key], answer_key)
        if key == "question" and "####" in answer and "gym" not in row:
            meta["solution"] = answer
            answer = answer.rsplit("####", 1)[1].strip()
    prompt = Prompt(
        messages=system_turn(row, turns) + turns,
        answer=answer,
        tests=() if test_key is None else _tests(row[test_key], test_key),
        meta=meta,
        tools=parse_tools(row.get("tools")),
        origin=origin,
    )
    return _naming_the_function(prompt) if prompt.tests else prompt


def _naming_the_function(prompt: Prompt) -> Prompt:
    """The prompt with a call of the function under test, where nothing in it names the function, as in MBPP.

    Only what the program is asked is shown, never what is expected. Without a name no answer could pass.
    """
    try:
        checks = unit_tests_of(prompt).checks
    except (ConversionError, TypeError):  # for the reward to tell, which counts it
        return prompt
    calls = [part for check in checks[:1] for asked in check.calls[:1] for part in ast.walk(ast.parse(asked))]
    for call in calls:
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id not in WRAPPERS:
            name, last = call.func.id, prompt.messages[-1]
            word = rf"\b{name}\b"
            named = word if "_" in name else rf"{word}\s*\(|[`'\"]{word}"
            if any(re.search(named, message.content) for message in prompt.messages):
                return prompt
            told = f"{last.content.rstrip()}\n\nYour program is called like this: `{ast.unparse(call)}`"
            return replace(prompt, messages=(*prompt.messages[:-1], replace(last, content=told)))
    return prompt


def _answer(value: Any, at: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow("wrong_type", f"{at} is {kind(value)}; expected text or a number")
    return checked_text(str(value), at)


def _tests(value: Any, at: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(test, str) for test in values):
        raise BadRow("wrong_type", f"{at} is {kind(value)}; expected test code, or a list of it")
    return tuple(checked_text(test, at) for test in values)


def _pair(question: str, answer: str) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


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
    "ranking": parse_ranking,
    "prompt": _prompt,
}
