"""Reads the calls out of what a model wrote, and puts them and their results into the dialogue.

Two forms: a tag with one text, ``<SEARCH-TOOL>query</SEARCH-TOOL>``, and JSON between ``<tool_call>`` tags, which is
what ``chatml`` and the templates of Qwen and Hermes print of OpenAI's tool calls. What a think block says is no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ptl.tools.base import TAG_END, Call, Result, Tool
from ptl.types import Message

if TYPE_CHECKING:
    from ptl.data.render import Renderer

_TAG = re.compile(rf"<([A-Z0-9][A-Z0-9-]*{TAG_END})>(.*?)(?:</\1>|$)", re.DOTALL)
_JSON = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def form_of(renderer: Renderer, tools: Sequence[Tool]) -> Literal["tags", "calls"]:
    """How a model of this tokenizer and template asks for tools.

    By tags where the tokenizer has the tag of one as a token, or where the template prints no list of tools; else by
    OpenAI's calls, and the template must be given the tools' schemas.
    """
    known = renderer.tokenizer.get_added_vocab()
    if any(tool.opening in known for tool in tools) or not renderer.prints_tools:
        return "tags"
    return "calls"


def stop_texts(tools: Sequence[Tool]) -> tuple[str, ...]:
    """What ends the writing of a turn, so that a tool can answer."""
    return tuple(tool.closing for tool in tools if tool.subject is not None)


def calls_in(text: str, tools: Sequence[Tool], begun: int = 0) -> list[Call]:
    """The calls of a turn, in order; one that cannot be run has a ``problem``.

    Args:
        text: what the model wrote, its tags included.
        tools: that there are.
        begun: calls that the dialogue has had, for the new ones' ids.
    """
    at = text.rfind("</think>")
    answer = text if at < 0 else text[at:]
    if "<think>" in answer:  # it was cut while it thought
        answer = answer.partition("<think>")[0]
    found = [(match.start(), _by_tag(match, tools)) for match in _TAG.finditer(answer)]
    found += [(match.start(), _by_json(match[1], tools)) for match in _JSON.finditer(answer)]
    calls = [call for _, call in sorted(found, key=lambda pair: pair[0])]
    return [Call(**{**vars(call), "id": f"call{begun + i:05d}"}) for i, call in enumerate(calls)]


def turn_of(text: str, calls: Sequence[Call]) -> Message:
    """The assistant's turn that made the calls, as a training row has it."""
    reasoning, content = None, text
    if text.startswith("<think>") and "</think>" in text:
        thought, _, content = text.removeprefix("<think>").partition("</think>")
        reasoning, content = thought.strip("\n"), content.lstrip("\n")
    if all(call.by_tag for call in calls):
        return Message(role="assistant", content=content, reasoning=reasoning)
    made = tuple(call.as_message() for call in calls)
    content = _JSON.sub("", content).rstrip("\n")
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=made)


def answers_of(results: Sequence[Result]) -> list[Message]:
    """The turns that hold the results; nothing of them is ever trained."""
    return [
        Message(role="tool", content=result.text)
        if result.call.by_tag
        else Message(role="tool", content=result.text, name=result.call.name, tool_call_id=result.call.id)
        for result in results
    ]


def _by_tag(match: re.Match[str], tools: Sequence[Tool]) -> Call:
    tag, text = match[1], match[2].strip()
    tool = next((tool for tool in tools if tool.tag == tag), None)
    if tool is None:
        name = tag.removesuffix(TAG_END).lower()
        return Call(name=name, arguments={}, problem=_unknown(name, tools), by_tag=True)
    if not match[0].endswith(tool.closing):
        return Call(name=tool.name, arguments={}, problem=f"the call was not closed by {tool.closing}", by_tag=True)
    if tool.subject is None:
        return Call(name=tool.name, arguments={}, problem="it needs several arguments: call it by JSON", by_tag=True)
    needed = tool.subject in tool.parameters.get("required", ())
    if not text and needed:
        return Call(name=tool.name, arguments={}, problem=f"{tool.opening} holds no {tool.subject}", by_tag=True)
    value, problem = _typed(text, tool.parameters["properties"][tool.subject])
    given = {tool.subject: value} if text else {}
    return Call(name=tool.name, arguments={} if problem else given, problem=problem, by_tag=True)


def _typed(text: str, schema: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The text as the one argument's type."""
    kind = schema.get("type", "string")
    if kind == "string":
        return text, None
    try:
        value = json.loads(text)
    except ValueError:
        return None, f"{text[:60]!r} is no {kind}"
    return (value, None) if _is(value, kind) else (None, f"{text[:60]!r} is no {kind}")


def _by_json(text: str, tools: Sequence[Tool]) -> Call:
    try:
        said = json.loads(text)
        name, arguments = said["name"], said.get("arguments", said.get("parameters", {}))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        problem = 'a call must be {"name": ..., "arguments": {...}} in JSON'
        return Call(name="", arguments={}, problem=problem)
    tool = next((tool for tool in tools if tool.name == name), None)
    problem = _unknown(name, tools) if tool is None else _mismatch(arguments, tool)
    return Call(name=name, arguments=arguments, problem=problem)


def _mismatch(arguments: Mapping[str, Any], tool: Tool) -> str | None:
    """What is wrong with the arguments, in one sentence."""
    known = tool.parameters.get("properties", {})
    for name in tool.parameters.get("required", ()):
        if name not in arguments:
            return f"{tool.name} needs the argument {name}"
    for name, value in arguments.items():
        if name not in known:
            return f"{tool.name} has no argument {name}; it has {', '.join(known) or 'none'}"
        kind = known[name].get("type")
        if isinstance(kind, str) and not _is(value, kind):
            return f"the argument {name} of {tool.name} must be of type {kind}"
    return None


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _KINDS.get(kind, (object,)))


def _unknown(name: str, tools: Sequence[Tool]) -> str:
    return f"there is no tool {name[:40]}; there are {', '.join(tool.name for tool in tools) or 'none'}"
