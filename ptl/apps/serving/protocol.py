"""The part of OpenAI's chat completions that this server speaks: what requests may hold, and what answers look like."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptl.data.messages import parse_messages, parse_tools
from ptl.data.sources import BadRow
from ptl.tools.base import Call
from ptl.types import Message

REFUSED = ("logprobs", "top_logprobs", "logit_bias", "response_format", "functions", "function_call", "audio")
"""Fields that would change the answer and are not served; others that are not known are passed over."""
MOST_STOPS, LONGEST_STOP = 4, 64


class BadRequest(ValueError):  # noqa: N818  (named for the status that it becomes)
    """What a client asked for cannot be done.

    Attributes:
        param: the field.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request.

    Attributes:
        messages: the dialogue.
        tools: schemas that the client offers.
        temperature, top_p, max_tokens, seed, stop: of the sampling; None where the client leaves it to the server.
        stream: pieces as they come.
        usage: a last piece with the counts.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """What the client has said, by the names of ``Reply``."""
        said = {"temperature": self.temperature, "top_p": self.top_p, "max_new_tokens": self.max_tokens}
        return {name: value for name, value in {**said, "seed": self.seed}.items() if value is not None}


def parse(body: bytes) -> Asked:
    """The request in a body.

    Raises:
        BadRequest: with the field.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON in UTF-8") from None
    if not isinstance(given, dict):
        raise BadRequest("the body is not an object")
    for name in REFUSED:
        if given.get(name) not in (None, False, {}, [], {"type": "text"}):
            raise BadRequest(f"{name} is not served: leave it out", name)
    if given.get("n") not in (None, 1):
        raise BadRequest(f"n is {given['n']!r}; one answer is given to a request", "n")
    try:
        messages = parse_messages(given.get("messages"), "messages", {})
        tools = parse_tools(given.get("tools"))
    except BadRow as bad:
        raise BadRequest(str(bad), "messages") from None
    if messages[-1].role not in ("user", "tool"):
        raise BadRequest(f"the last message is the {messages[-1].role}'s; expected a user's or a tool's", "messages")
    choice = given.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise BadRequest(f"tool_choice is {choice!r}; expected auto or none", "tool_choice")
    most = "max_completion_tokens" if given.get("max_completion_tokens") is not None else "max_tokens"
    return Asked(
        messages=messages,
        tools=() if choice == "none" else tools,
        temperature=_number(given, "temperature", 0.0, 100.0),
        top_p=_number(given, "top_p", 1e-6, 1.0),
        max_tokens=_whole(given, most, 1),
        seed=_whole(given, "seed", 0),
        stop=_stops(given.get("stop")),
        stream=given.get("stream") is True,
        usage=isinstance(given.get("stream_options"), dict) and given["stream_options"].get("include_usage") is True,
    )


def _number(given: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequest(f"{name} is {value!r}; expected a number", name)
    if not least <= value <= most:
        raise BadRequest(f"{name} is {value:g}; expected {least:g} to {most:g}", name)
    return float(value)


def _whole(given: Mapping[str, Any], name: str, least: int) -> int | None:
    value = given.get(name)
    if value is not None and (type(value) is not int or not least <= value < 1 << 63):
        raise BadRequest(f"{name} is {value!r}; expected a whole number of {least} or more", name)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    ):
        raise BadRequest(f"stop: expected at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters", "stop")
    return tuple(stops)


class Answer:
    """The answer to one request, whole or in pieces.

    Arguments:
        model: its name.
    """

    def __init__(self, model: str) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, calls: Sequence[Call], finish: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """All of it."""
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": dict(usage)}

    def piece(self, delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        """Some of it."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def calls(self, calls: Sequence[Call]) -> dict[str, Any]:
        """The calls, as one piece."""
        return self.piece({"tool_calls": [{"index": i, **_call(call)} for i, call in enumerate(calls)]})

    def counts(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last piece, where it was asked for."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": dict(usage)}


def _call(call: Call) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments), ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id or f"call_{secrets.token_hex(8)}", "type": "function", "function": function}


def error(message: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """What a client library reads of a refusal."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
