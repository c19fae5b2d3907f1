"""Prompts as rows: rendered up to the answer, whole again for the judges, too long only beside their answer."""

from __future__ import annotations

import pytest

from ptl.data.prompts import PromptView, record_of, written
from ptl.data.render import Renderer, RenderError
from ptl.types import Message, Origin, Prompt

ORIGIN = Origin("rows.jsonl", 3)


def asked(*contents: str, **fields) -> Prompt:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[i % 2], content=content) for i, content in enumerate(contents))
    return Prompt(messages=messages, origin=ORIGIN, **fields)


def test_a_prompt_is_the_same_after_it_was_written():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = (
        Message(role="system", content="be short"),
        Message(role="user", content="hé", name="bob"),
        Message(role="assistant", content="", reasoning="hm", tool_calls=(call,)),
        Message(role="tool", content="4", tool_call_id="a"),
        Message(role="user", content="so?"),
    )
    tools = ({"name": "f", "parameters": {}},)
    prompt = Prompt(
        messages=messages, answer="4", tests=("assert f(1) == 2",), meta={"level": 3}, tools=tools, origin=ORIGIN
    )
    assert record_of(written(prompt)) == prompt


def test_law_2_the_ids_are_the_template_with_its_generation_prompt(tokenizer):
    example = PromptView(room=8).encode([asked("hello", "world", "the fox")], Renderer(tokenizer), 512, "error")[0]
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    chat.append({"role": "user", "content": "the fox"})
    expected = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert not isinstance(example, RenderError) and example[0]["ids"].tolist() == expected


@pytest.mark.parametrize("truncation", ["error", "drop", "keep_start"])
def test_a_prompt_that_leaves_no_room_is_too_long(tokenizer, truncation):
    view, prompt = PromptView(room=500), asked("hello world " * 4)
    found = view.encode([prompt], Renderer(tokenizer), 512, truncation)[0]
    assert isinstance(found, RenderError) and found.reason == "too_long"
    assert "max_length 512 leaves 12 to a prompt beside max_new_tokens 500" in str(found)


def test_the_oldest_turns_give_way(tokenizer):
    renderer = Renderer(tokenizer)
    prompt = asked("hello " * 20, "world", "the fox", answer="jumps")
    short = renderer.prompt(prompt.messages[2:])
    example = PromptView(room=8).encode([prompt], renderer, len(short) + 8, "drop_oldest_turns")[0]
    assert not isinstance(example, RenderError)
    assert example[0]["ids"].tolist() == short and example[0]["truncated"]
    assert [m.content for m in record_of(example[0]["prompt"]).messages] == ["the fox"]
