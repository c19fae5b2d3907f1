"""Layouts: words are placed by proof, and a remembered shape gives what turn by turn gives."""

from __future__ import annotations

import random

import pytest

from ptl.data.chat_template import ChatTemplate
from ptl.data.documents import Documents, sought_literals
from ptl.data.layout import form_of, learn_layout, masked, place, split_text
from ptl.data.tokenizer import resolve_template
from tests import tiny
from tests.data.chat_cases import CALL, FOLDER, chat, published, say


def template_of(source: str, tokenizer) -> ChatTemplate:
    return ChatTemplate(source, tokenizer, {}, "2025-01-01")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", ("hello",)),
        (" \n hello world\t", ("hello world",)),
        ("", ()),
        (" \n", ()),
        ("<think>\nwhy\n</think>\n\nso", ("why", "so")),
        ("<think></think>so", ("so",)),
        ("<think>\n</think>\n", ()),
        ("<think>why</think>", ("why",)),
        ("so <think>why</think>", ("so <think>why</think>",)),
    ],
)
def test_a_text_is_its_literals_and_words(text, words):
    split = split_text(text)
    assert split.words == words and len(split.literals) == len(words) + 1
    assert "".join(part for pair in zip(split.literals, (*words, "")) for part in pair) == text


def test_words_are_placed_only_if_literals_and_words_give_the_print(tokenizer):
    template = template_of(tiny.CHATML, tokenizer)
    talk = template.chat(chat("hello", "hello", " hello ", "[[1,2],[3,4]]").messages)
    text = template.print(talk)
    placed = place(template, talk, (), text)
    assert placed is not None
    assert [text[a:b] for a, b in zip(placed.starts, placed.ends)] == ["hello", "hello", "hello", "[[1,2],[3,4]]"]
    assert placed.messages == [0, 1, 2, 3]
    layout = learn_layout(template, talk)
    assert layout.place(form_of(talk)[1], text + " ") is None
    assert layout.place(form_of(talk)[1], text.replace("hello", "hallo", 1)) is None
    assert len({message["content"].strip() for message in masked(talk)}) == 4


def test_a_template_that_changes_words_is_not_placed(tokenizer):
    template = template_of(tiny.CHATML.replace("m['content'] +", "m['content'] | upper +"), tokenizer)
    talk = template.chat(chat("hello", "WORLD").messages)
    assert place(template, talk, (), template.print(talk)) is None


@pytest.mark.parametrize(
    "name", ["smollm2", "qwen2_5_training", "qwen3", "llama3", "mistral_v3", "phi3", "olmo2", "gptoss"]
)
def test_a_remembered_shape_gives_what_turn_by_turn_gives(name):
    tokenizer = published(name)
    template = template_of((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"), tokenizer)
    documents, rng, shaped = Documents(template, "inference"), random.Random(0), 0
    words = ["hello", " fox", "dog ", "[[1,2]]", "\n\n", "<tool_response>", "answer 7", "été"]
    for _ in range(60):
        turns = ["".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(2 * rng.randint(1, 3))]
        talk = template.chat(chat(*turns).messages)
        weights = [float(i % 2 and rng.random() < 0.8) for i in range(len(talk))]
        weights[-1] = 1.0
        quick, slow = documents._by_shape(talk, (), weights), documents._by_turn(talk, (), weights)
        shaped += quick is not None
        assert quick is None or quick == slow
        assert documents.plan(talk, (), weights) == slow
    assert shaped >= 10


def test_tool_calls_fill_no_memory(tokenizer):
    template = template_of(resolve_template("chatml") or "", tokenizer)
    documents = Documents(template, "inference")
    messages = (say("user", "weather?"), say("assistant", tool_calls=(CALL,)))
    (document,) = documents.plan(template.chat(messages), (), [0.0, 1.0])
    assert document.text[slice(*document.spans[0][:2])].startswith("<tool_call>") and not documents._shapes


def test_words_that_a_template_looks_for_are_planned_turn_by_turn():
    source = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
    assert set(sought_literals(source)) == {"</think>", "<think>", "<tool_response>", "</tool_response>"}
    template = template_of(source, published("qwen3", bos=None, eos="<|im_end|>"))
    documents = Documents(template, "inference")
    for words, quick in (("hello", True), ("see </think> there", False)):
        talk = template.chat(chat("hello", words).messages)
        assert (documents._by_shape(talk, (), [0.0, 1.0]) is not None) == quick
