"""What a model wrote, as calls; and the turns they become."""

import json

import pytest

from ptl.tools.base import Call, Result, Tool
from ptl.tools.calls import answers_of, calls_in, stop_texts, turn_of
from ptl.tools.load import load_tools

SEARCH = Tool(
    name="search",
    description="d",
    parameters={"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    function="a.b",
)
COUNT = Tool(
    name="count_to",
    description="d",
    parameters={
        "type": "object",
        "properties": {"end": {"type": "integer"}, "by": {"type": "integer"}},
        "required": ["end"],
    },
    function="a.b",
)
PAIR = Tool(
    name="pair",
    description="d",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
        "required": ["a", "b"],
    },
    function="a.b",
)
TOOLS = (SEARCH, COUNT, PAIR)


def json_call(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_a_tag_is_a_call():
    [call] = calls_in("I look. <SEARCH-TOOL> capital of France </SEARCH-TOOL>", TOOLS)
    assert call == Call(name="search", arguments={"query": "capital of France"}, by_tag=True, id="call00000")


def test_json_is_a_call_and_order_is_kept():
    first, last = json_call("search", {"query": "x"}), json_call("pair", {"a": "b", "b": "c"})
    text = f"{first}\n<COUNT-TO-TOOL>7</COUNT-TO-TOOL>{last}"
    calls = calls_in(text, TOOLS, begun=3)
    assert [(call.name, call.arguments, call.by_tag) for call in calls] == [
        ("search", {"query": "x"}, False),
        ("count_to", {"end": 7}, True),
        ("pair", {"a": "b", "b": "c"}, False),
    ]
    assert [call.id for call in calls] == ["call00003", "call00004", "call00005"]
    assert all(call.problem is None for call in calls)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<SEARCH-TOOL></SEARCH-TOOL>", "holds no query"),
        ("<SEARCH-TOOL>never closed", "was not closed by </SEARCH-TOOL>"),
        ("<FETCH-TOOL>x</FETCH-TOOL>", "there is no tool fetch; there are search, count_to, pair"),
        ("<COUNT-TO-TOOL>many</COUNT-TO-TOOL>", "'many' is no integer"),
        ("<COUNT-TO-TOOL>true</COUNT-TO-TOOL>", "'true' is no integer"),
        ("<PAIR-TOOL>x</PAIR-TOOL>", "call it by JSON"),
        ("<tool_call>{'name': 'search'}</tool_call>", "in JSON"),
        ("<tool_call>" + "[" * 100_000, "in JSON"),
        ("<tool_call>[1]</tool_call>", "in JSON"),
        (json_call("fetch", {}), "there is no tool fetch"),
        (json_call("search", {}), "search needs the argument query"),
        (json_call("search", {"query": "x", "site": "y"}), "search has no argument site; it has query"),
        (json_call("search", {"query": 3}), "must be of type string"),
        (json_call("count_to", {"end": True}), "must be of type integer"),
    ],
)
def test_a_call_that_cannot_be_run_says_why(text, problem):
    [call] = calls_in(text, TOOLS)
    assert call.problem is not None and problem in call.problem


def test_ordinary_text_and_thoughts_hold_no_call():
    assert calls_in("The tag <b>x</b> is HTML. <search-tool>x</search-tool>", TOOLS) == []
    thought = "<think>I could <SEARCH-TOOL>x</SEARCH-TOOL></think>"
    assert calls_in(thought, TOOLS) == [] and calls_in("<think> <SEARCH-TOOL>x</SEARCH-TOOL>", TOOLS) == []
    assert len(calls_in(f"{thought}<SEARCH-TOOL>y</SEARCH-TOOL>", TOOLS)) == 1


def test_the_turns_of_both_forms():
    by_tag = "I look. <SEARCH-TOOL>x</SEARCH-TOOL>"
    calls = calls_in(by_tag, TOOLS)
    turn = turn_of(by_tag, calls)
    assert turn.content == by_tag and turn.tool_calls == ()
    [told] = answers_of([Result(calls[0], "found")])
    assert (told.role, told.content, told.tool_call_id) == ("tool", "found", None)
    by_json = f"<think>\nhm\n</think>\n\nI look.\n{json_call('search', {'query': 'x'})}"
    calls = calls_in(by_json, TOOLS)
    turn = turn_of(by_json, calls)
    assert (turn.reasoning, turn.content) == ("hm", "I look.")
    assert turn.tool_calls[0]["function"] == {"name": "search", "arguments": {"query": "x"}}
    [told] = answers_of([Result(calls[0], "found")])
    assert (told.tool_call_id, told.name) == ("call00000", "search")


def test_a_turn_stops_behind_a_closing_tag():
    assert stop_texts(TOOLS) == ("</SEARCH-TOOL>", "</COUNT-TO-TOOL>")


def test_ready_tools_can_all_be_called_by_tag():
    tools = load_tools(["python", "calculator", "clock"])
    assert [tool.subject for tool in tools] == ["code", "expression", "zone"]
    [call] = calls_in("<CLOCK-TOOL></CLOCK-TOOL>", tools)
    assert call.problem is None and call.arguments == {}
