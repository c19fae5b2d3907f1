"""From the message dicts of a row to ``Message``: roles, content, tool calls and loss weights, checked.

Every check names its reason (``sources.REASONS``) and the place in the row (``messages[3].content``), never the text.
Tool arguments pass through as they were read: no key is added, removed or retyped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ptl.data.sources import BadRow
from ptl.types import ROLES, Message

ROLE_NAMES: Mapping[str, str] = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "instruction"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
"""Role names met in public data -> ``ROLES``. ``Source.roles`` adds to them and wins."""

CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT roles whose value is the JSON of the calls an assistant makes."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def parse_messages(value: Any, at: str, roles: Mapping[str, str]) -> tuple[Message, ...]:
    """A list of message dicts (or its JSON text) as messages.

    Args:
        value: ``[{"role", "content", ...}]`` or ``[{"from", "value"}]``.
        at: name of the field, for errors.
        roles: extra role names, as ``Source.roles``.

    Raises:
        BadRow: with the reason and the place.
    """
    value = decoded(value, at) if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise BadRow("wrong_type", f"{at} is {kind(value)}; expected a list of messages")
    if not value:
        raise BadRow("empty_conversation", f"{at} has no message")
    return tuple(parse_message(item, f"{at}[{i}]", roles) for i, item in enumerate(value))


def parse_message(item: Any, at: str, roles: Mapping[str, str]) -> Message:
    """One message dict, checked."""
    if not isinstance(item, Mapping):
        raise BadRow("wrong_type", f"{at} is {kind(item)}; expected a message with role and content")
    if len(item) == 2 and (plain := _plain(item, at, roles)):
        return plain
    raw_role = _first(item, ("role", "from"))
    if raw_role is None:
        raise BadRow("missing_key", f"{at} has no role; its keys are {sorted(map(str, item))}")
    role = parse_role(raw_role, at, roles)
    calls = parse_tool_calls(item, at)
    content_key = "value" if "value" in item and "content" not in item else "content"
    content = item.get(content_key)
    if raw_role in CALL_ROLES and raw_role not in roles:
        calls, content = _calls(content, f"{at}.{content_key}"), ""
    elif content is None and role == "assistant" and calls:
        content = ""
    elif content is None and content_key not in item:
        raise BadRow("missing_key", f"{at} has no content; its keys are {sorted(map(str, item))}")
    content = parse_content(content, f"{at}.{content_key}")
    if role in ("user", "assistant") and not calls and not content.strip():
        raise BadRow("empty_content", f"{at}.{content_key} is blank and the {role} message has no tool call")
    return Message(
        role=role,
        content=content,
        reasoning=optional_text(_first(item, REASONING_KEYS), f"{at}.reasoning"),
        tool_calls=calls,
        tool_call_id=optional_text(item.get("tool_call_id"), f"{at}.tool_call_id"),
        name=optional_text(item.get("name"), f"{at}.name"),
        train=parse_weight(item, at),
    )


def _plain(item: Mapping[str, Any], at: str, roles: Mapping[str, str]) -> Message | None:
    """A message of nothing but a known role and a text, which most are; None for all others."""
    role, content = item.get("role"), item.get("content")
    if type(role) is str and role in ROLES and role not in roles and type(content) is str and content.strip():
        return Message(role=role, content=checked_text(content, f"{at}.content"))
    return None


def parse_role(value: Any, at: str, roles: Mapping[str, str]) -> str:
    """A role name as one of ``ROLES``."""
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{at}.role is {kind(value)}; expected a string")
    role = roles.get(value) or ROLE_NAMES.get(value) or ROLE_NAMES.get(value.lower())
    if role is None:
        raise BadRow("unknown_role", f"{at}.role is {value[:40]!r}; map it with `roles: {{{value[:40]}: user}}`")
    if role not in ROLES:
        raise BadRow("unknown_role", f"{at}.role is mapped to {role!r} by `roles`; expected one of {list(ROLES)}")
    return role


def parse_content(value: Any, at: str) -> str:
    """Content as text: a string, or a list of text parts that are joined as they are.

    Raises:
        BadRow: ``null_content``, ``not_text``, ``wrong_type`` or ``wrong_encoding``.
    """
    if isinstance(value, str):
        return checked_text(value, at)
    if value is None:
        raise BadRow("null_content", f"{at} is null; expected text")
    if not isinstance(value, list | tuple):
        raise BadRow("wrong_type", f"{at} is {kind(value)}; expected text or a list of text parts")
    parts: list[str] = []
    for i, part in enumerate(value):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise BadRow("not_text", f"{at}[{i}] is not a text part; images, audio and other parts cannot be trained")
        parts.append(text)
    return checked_text("".join(parts), at)


def checked_text(text: str, at: str) -> str:
    """The text, refused where it cannot be UTF-8 (lone surrogates, which JSON escapes and wrong encodings leave)."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("wrong_encoding", f"{at} has a character that is not UTF-8 at offset {error.start}") from None
    return text


def _encodable(values: tuple[Any, ...], at: str) -> tuple[Any, ...]:
    """JSON values, refused where a text inside them cannot be UTF-8."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("wrong_encoding", f"{at} has a character that is not UTF-8") from None
    return values


def optional_text(value: Any, at: str) -> str | None:
    """None, or checked text."""
    if value is None or isinstance(value, str):
        return value if value is None else checked_text(value, at)
    raise BadRow("wrong_type", f"{at} is {kind(value)}; expected a string")


def parse_weight(item: Mapping[str, Any], at: str) -> float | None:
    """The loss weight of a message: ``train``, else ``weight``; a boolean or a finite number >= 0."""
    key = "train" if item.get("train") is not None else "weight"
    value = item.get(key)
    if value is None:
        return None
    if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
        return float(value)
    got = value if isinstance(value, int | float) else kind(value)
    raise BadRow("bad_weight", f"{at}.{key} is {got}; expected true, false or a finite number >= 0")


def parse_tool_calls(item: Mapping[str, Any], at: str) -> tuple[Mapping[str, Any], ...]:
    """The calls of a message, from ``tool_calls`` or from the older ``function_call``, in OpenAI form."""
    key = "tool_calls" if item.get("tool_calls") is not None else "function_call"
    value = item.get(key)
    return () if value is None or value == [] or value == "" else _calls(value, f"{at}.{key}")


def _calls(value: Any, at: str) -> tuple[Mapping[str, Any], ...]:
    value = decoded(value, at, "bad_tool_call") if isinstance(value, str) else value
    calls = value if isinstance(value, list | tuple) else [value]
    if not calls:
        raise BadRow("bad_tool_call", f"{at} has no call")
    return _encodable(tuple(_call(call, f"{at}[{i}]") for i, call in enumerate(calls)), at)


def _call(call: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(call, Mapping):
        raise BadRow("bad_tool_call", f"{at} is {kind(call)}; expected an object with a function")
    function = call.get("function", call)
    if isinstance(function, str):
        function = decoded(function, f"{at}.function", "bad_tool_call")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise BadRow("bad_tool_call", f"{at} has no function name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = decoded(arguments, f"{at}.arguments", "bad_tool_call") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise BadRow("bad_tool_call", f"{at}.arguments is {kind(arguments)}; expected an object or its JSON text")
    out: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(call.get("id"), str):
        out["id"] = call["id"]
    return out


def parse_tools(value: Any, at: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """The tools column: a list of JSON schemas or its JSON text; absent, null and blank mean no tools.

    A bare ``{"name", "parameters"}`` is wrapped as ``{"type": "function", "function": ...}``, the form in which servers
    hand tools to the template at inference.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    value = decoded(value, at, "bad_tools") if isinstance(value, str) else value
    if not isinstance(value, list | tuple):
        raise BadRow("bad_tools", f"{at} is {kind(value)}; expected a list of JSON schemas")
    tools = []
    for i, tool in enumerate(value):
        tool = decoded(tool, f"{at}[{i}]", "bad_tools") if isinstance(tool, str) else tool
        if not isinstance(tool, Mapping) or not tool:
            raise BadRow("bad_tools", f"{at}[{i}] is {kind(tool)}; expected a JSON schema")
        tools.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return _encodable(tuple(tools), at)


def decoded(text: str, at: str, reason: str = "wrong_type") -> Any:
    """The value of JSON text inside a field."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(reason, f"{at} is text that is not JSON") from None


def kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", str: "a string", dict: "an object", list: "a list"}
    return names.get(type(value)) or ("a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _first(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((item[key] for key in keys if item.get(key) is not None), None)
