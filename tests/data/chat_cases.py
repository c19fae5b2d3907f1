"""Conversations and tokenizers that the renderer's tests share."""

from __future__ import annotations

import re
from pathlib import Path

from ptl.data.render import Renderer, RenderPolicy
from ptl.types import Conversation, Message, Origin, Tokens
from tests import tiny

FOLDER = Path(__file__).parent / "chat_templates"
ORIGIN = Origin("chat.jsonl", 1)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
        },
    },
)
CALL = {"type": "function", "id": "call12345", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def say(role: str, content: str = "", **fields) -> Message:
    return Message(role=role, content=content, **fields)


def talk(*messages: Message, tools=()) -> Conversation:
    return Conversation(messages=messages, tools=tools, origin=ORIGIN)


def chat(*turns: str) -> Conversation:
    """User and assistant by turns."""
    return talk(*(say(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)))


CASES = {
    "single": chat("What is 2+2?", "The answer is 4."),
    "multi": chat("hello", "[[1,2],[3,4]]", "hello", "hello"),
    "system": talk(say("system", "Be kind."), say("user", "hello"), say("assistant", "world")),
    "tools": talk(
        say("user", "What is the weather?"),
        say("assistant", tool_calls=(CALL,)),
        say("tool", "sun", name="weather", tool_call_id="call12345"),
        say("assistant", "It is sunny."),
        tools=TOOLS,
    ),
    "think": chat("hello", "<think>\nsay world\n</think>\n\nworld", "fox", "<think>\nsay dog\n</think>\n\ndog"),
    "reasoning": talk(
        say("user", "hello"),
        say("assistant", "world", reasoning="say world"),
        say("user", "fox"),
        say("assistant", "dog", reasoning="say dog"),
    ),
}


def make(template: str | None, *, special=("<|im_start|>", "<|im_end|>"), bos=None, eos="<|im_end|>"):
    """A tiny tokenizer with a template, its BOS and its EOS."""
    names = tuple(dict.fromkeys([*([bos] if bos else []), eos, *special]))
    tokenizer = tiny.make_tokenizer(special=names, eos=eos, template=template)
    if bos:
        tokenizer.bos_token = bos
    return tokenizer


def published(name: str, *, bos="<s>", eos="</s>"):
    """A tiny tokenizer with a published template, in which all that looks like a special token is one."""
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    special = re.findall(r"<\|[A-Za-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?(?:INST|TOOL_CALLS)\]", source)
    return make(source, special=tuple(sorted(set(special))), bos=bos, eos=eos)


def trained(tokens: Tokens, tokenizer) -> list[str]:
    """The texts of the runs of trained tokens."""
    runs: list[list[int]] = []
    inside = False
    for token, weight in zip(tokens.ids.tolist(), tokens.loss_mask.tolist()):
        if weight and not inside:
            runs.append([])
        if weight:
            runs[-1].append(token)
        inside = bool(weight)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def rendered(tokenizer, conversation: Conversation, template: str | None = None, **policy) -> list[list[str]]:
    """The trained texts of each document."""
    renderer = Renderer(tokenizer, template, RenderPolicy(**policy))
    return [trained(tokens, tokenizer) for tokens in renderer.render(conversation)]
