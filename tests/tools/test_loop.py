"""The loop around tools: its tokens are those of the training row, and it always ends."""

import re

import pytest

from ptl.data.render import Renderer
from ptl.tools.base import Result
from ptl.tools.between import between
from ptl.tools.calls import form_of
from ptl.tools.load import load_tools
from ptl.tools.loop import Piece, Stopped, answer
from ptl.tools.toolbox import Toolbox
from ptl.types import Conversation, Message, Origin
from tests import tiny

HERE = Origin("test", 1)
ASKS = "I count. <CALCULATOR-TOOL>6 * 7</CALCULATOR-TOOL>"
CALLS = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6 * 7"}}\n</tool_call>'


@pytest.fixture(scope="module")
def box():
    box = Toolbox(load_tools(["calculator", "tests.tools.parts:marked"]), seconds=20)
    yield box
    box.close()


@pytest.fixture(scope="module")
def tagged():
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<CALCULATOR-TOOL>", "</CALCULATOR-TOOL>"])
    return Renderer(tokenizer, "chatml")


def scripted(*turns):
    """A model that says these, a few characters at a time, and what it was asked."""
    left, asked = list(turns), []

    def write(messages):
        asked.append(list(messages))
        text = left.pop(0)
        yield from (text[i : i + 5] for i in range(0, len(text), 5))

    return write, asked


def test_the_loop_writes_the_dialogue_of_a_training_row(box):
    write, asked = scripted(ASKS, "It is 42.")
    messages = [Message(role="user", content="6 times 7?")]
    events = list(answer(messages, write, box))
    assert "".join(event.text for event in events if isinstance(event, Piece)) == ASKS + "It is 42."
    assert [event.text for event in events if isinstance(event, Result)] == ["42"]
    assert [(m.role, m.content) for m in messages] == [
        ("user", "6 times 7?"),
        ("assistant", ASKS),
        ("tool", "42"),
        ("assistant", "It is 42."),
    ]
    assert asked[1] == messages[:3]


@pytest.mark.parametrize("form", ["tags", "calls"])
def test_law_2_the_tokens_of_the_loop_are_those_of_the_training_row(box, tagged, form):
    """At each request the context is the row's prefix, and what the model wrote is followed by the row's tokens."""
    write, asked = scripted(ASKS if form == "tags" else CALLS, "It is 42.")
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="6 times 7? é")]
    list(answer(messages, write, box))
    tools = tuple(box.schemas) if form == "calls" else ()
    [row] = tagged.render(Conversation(messages=tuple(messages), tools=tools, origin=HERE))
    ids = row.ids.tolist()
    for context in asked:
        prompt = tagged.prompt(context, tools)
        assert ids[: len(prompt)] == prompt
    first, second = (tagged.prompt(context, tools) for context in asked)
    bridge = between(tagged, asked[0], messages[2], [messages[3]], tools, ended=True)
    assert second[-len(bridge) :] == bridge
    wrote = second[len(first) : -len(bridge)]
    assert wrote[-1] in tagged.terminators
    unended = between(tagged, asked[0], messages[2], [messages[3]], tools, ended=False)
    assert unended == [wrote[-1], *bridge]
    # The call and the answer are trained, the result is not.
    trained = tagged.tokenizer.decode(ids_where(row, 1.0))
    said = ASKS if form == "tags" else CALLS
    assert said in trained and "It is 42." in trained
    untrained = tagged.tokenizer.decode(ids_where(row, 0.0))
    assert "42" in untrained and "6 * 7" not in untrained


def ids_where(row, weight):
    return [int(token) for token, mask in zip(row.ids, row.loss_mask) if mask == weight]


def test_a_template_that_rewrites_history_is_refused_for_training():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role != 'assistant' else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = Renderer(tiny.make_tokenizer(), template)
    turn, told = Message(role="assistant", content=ASKS), Message(role="tool", content="42")
    with pytest.raises(ValueError, match="otherwise than the model wrote it"):
        between(renderer, [Message(role="user", content="hi")], turn, [told], ended=True)


def test_what_a_tool_says_is_text_and_no_turn(box, tagged):
    """Marks of turns and tags in a result are neither special tokens nor calls."""
    write, asked = scripted("<MARKED-TOOL>hello</MARKED-TOOL>", "Well.")
    messages = [Message(role="user", content="go")]
    list(answer(messages, write, box))
    assert "<|im_start|>user" in messages[2].content and len(asked) == 2
    ids = tagged.prompt(asked[1])
    marks = {tagged.tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>")}
    assert sum(token in marks for token in ids) == 7  # three turns and the next one's header


def test_the_loop_ends_when_a_model_only_ever_asks(box):
    write, _ = scripted(*[ASKS] * 4)
    messages = [Message(role="user", content="?")]
    events = list(answer(messages, write, box, rounds=3))
    assert isinstance(events[-1], Stopped) and "more than 3 times" in events[-1].reason
    assert sum(isinstance(event, Result) for event in events) == 3
    assert messages[-1].content == ASKS


def test_a_call_that_fails_is_told_and_the_model_may_try_again(box):
    write, _ = scripted("<CALCULATOR-TOOL>six</CALCULATOR-TOOL>", "<WEATHER-TOOL>x</WEATHER-TOOL>", ASKS, "42")
    messages = [Message(role="user", content="?")]
    results = [event for event in answer(messages, write, box) if isinstance(event, Result)]
    assert [bool(result.problem) for result in results] == [True, True, False]
    assert re.match("Error: .*no arithmetic", results[0].text) and "no tool weather" in results[1].text


def test_the_form_is_told_from_tokenizer_and_template(tagged, box):
    assert form_of(tagged, box.tools) == "tags"
    assert form_of(Renderer(tiny.make_tokenizer(), "chatml"), box.tools) == "calls"
    assert form_of(Renderer(tiny.make_tokenizer(), "im_sep"), box.tools) == "tags"
