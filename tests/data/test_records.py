"""Rows as records: every format, and every reason for which a row is refused."""

import json

import pytest

from ptl.data.records import parse_row
from ptl.data.sources import REASONS, BadRow, Source
from ptl.types import Message, Origin

HERE = Origin("data.jsonl", 7)
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": 1, "n": None, "deep": {"b": [1, "é"], "a": 2.0}}}
SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


def read(row, row_format="messages", **options):
    return parse_row(row, row_format, Source(path="data.jsonl", **options), HERE)


def said(messages):
    return [(message.role, message.content) for message in messages]


def test_messages_with_everything():
    record = read(
        {
            "messages": [
                {"role": "developer", "content": ""},
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
                },
                {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}, "b"], "reasoning_content": "why"},
                {"role": "user", "content": "more", "train": True},
                {"role": "assistant", "content": "half", "weight": 0.5},
                {"role": "assistant", "content": "no", "train": False, "weight": 1},
            ],
            "tools": [SCHEMA],
        }
    )
    assert record.origin == HERE and record.text is None
    assert said(record.messages)[:5] == [
        ("developer", ""),
        ("user", "q"),
        ("assistant", ""),
        ("tool", ""),
        ("assistant", "ab"),
    ]
    assert record.messages[2].tool_calls == ({"type": "function", "function": CALL, "id": "c1"},)
    assert (record.messages[3].tool_call_id, record.messages[3].name) == ("c1", "f")
    assert record.messages[4].reasoning == "why"
    assert [message.train for message in record.messages[4:]] == [None, 1.0, 0.5, 0.0]
    assert record.tools == ({"type": "function", "function": SCHEMA},)


@pytest.mark.parametrize("form", ["object", "json", "flat", "function_call", "function json", "calls json"])
def test_tool_arguments_are_kept_exactly(form):
    whole = {"type": "function", "function": CALL}
    text = {"name": "f", "arguments": json.dumps(CALL["arguments"])}
    calls = {
        "object": {"tool_calls": [whole]},
        "json": {"tool_calls": [{"type": "function", "function": text}]},
        "flat": {"tool_calls": [CALL]},
        "function_call": {"function_call": text},
        "function json": {"tool_calls": [{"function": json.dumps(CALL)}]},
        "calls json": {"tool_calls": json.dumps([whole])},
    }[form]
    record = read({"messages": [USER, {"role": "assistant", "content": None, **calls}]})
    assert record.messages[1].tool_calls == (whole,)
    assert json.dumps(record.messages[1].tool_calls[0]) == json.dumps(whole)  # the order of keys too


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    record = read({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})
    assert record.messages[1].tool_calls[0]["function"]["arguments"] == {}


@pytest.mark.parametrize("tools", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)]])
def test_tools_are_a_list_or_json(tools):
    assert read({"messages": [USER, ANSWER], "tools": tools}).tools[0]["function"] == SCHEMA
    wrapped = {"type": "function", "function": SCHEMA}
    assert read({"messages": [USER, ANSWER], "tools": [wrapped]}).tools == (wrapped,)


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools):
    assert read({"messages": [USER, ANSWER], "tools": tools}).tools == ()


def test_sharegpt_with_calls_and_results():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "[1]"},
        {"from": "gpt", "value": "a"},
    ]
    record = read({"conversations": turns, "tools": json.dumps([SCHEMA])}, "sharegpt")
    assert said(record.messages) == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", ""),
        ("tool", "[1]"),
        ("assistant", "a"),
    ]
    assert record.messages[2].tool_calls == ({"type": "function", "function": CALL},)
    assert said(read({"conversation": turns[1:]}, "sharegpt").messages)[0] == ("user", "q")


@pytest.mark.parametrize(
    ("name", "role"), [("human", "user"), ("GPT", "assistant"), ("ipython", "tool"), ("Chef", "user")]
)
def test_roles_are_mapped(name, role):
    record = read({"messages": [{"role": name, "content": "x"}, ANSWER]}, roles={"Chef": "user"})
    assert record.messages[0].role == role


def test_a_system_column_comes_first_unless_the_turns_have_one():
    own = {"role": "system", "content": "own"}
    assert said(read({"messages": [USER, ANSWER], "system": "s"}).messages)[0] == ("system", "s")
    assert said(read({"messages": [own, USER, ANSWER], "system": "s"}).messages)[0] == ("system", "own")
    assert said(read({"messages": [USER, ANSWER], "system": " "}).messages)[0] == ("user", "q")


def test_alpaca():
    row = {"instruction": "do", "input": "this", "output": "done", "history": [["q", "a"]], "system": "s"}
    assert said(read(row, "alpaca").messages) == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "do\nthis"), ("assistant", "done"),
    ]  # fmt: skip
    assert said(read({"instruction": "do", "input": "", "output": "done"}, "alpaca").messages)[0] == ("user", "do")


def test_prompt_and_completion_as_text_and_as_messages():
    assert read({"prompt": "q", "completion": "a"}, "prompt_completion").messages == (
        Message(role="user", content="q"),
        Message(role="assistant", content="a"),
    )
    earlier = [USER, ANSWER, {**ANSWER, "train": 1}, USER]
    record = read({"prompt": earlier, "completion": [ANSWER]}, "prompt_completion")
    assert [message.train for message in record.messages] == [None, 0.0, 1.0, None, None]


def test_plain_text():
    record = read({"body": " a\nb "}, "text", columns={"text": "body"})
    assert record.text == " a\nb " and record.messages == ()


def test_prompts():
    record = read({"question": "q", "answer": "so 5 #### 1,072", "level": 3}, "prompt")
    assert record.answer == "1,072" and record.meta == {"level": 3, "solution": "so 5 #### 1,072"}
    record = read({"prompt": [USER], "test_list": ["assert a", "assert b"]}, "prompt")
    assert record.tests == ("assert a", "assert b") and record.answer is None
    assert read({"prompt": "q", "answer": 4}, "prompt").answer == "4"


REFUSED = [
    ("missing_key", "messages", {"dialog": [USER]}),
    ("missing_key", "messages", {"messages": [{"content": "x"}]}),
    ("missing_key", "messages", {"messages": [{"role": "user"}, ANSWER]}),
    ("missing_key", "prompt", {"answer": "a"}),
    ("wrong_type", "messages", {"messages": 3}),
    ("wrong_type", "messages", {"messages": "not json"}),
    ("wrong_type", "messages", {"messages": ["text"]}),
    ("wrong_type", "messages", {"messages": [USER, {"role": "assistant", "content": 3}]}),
    ("wrong_type", "messages", {"messages": [{"role": 1, "content": "x"}]}),
    ("wrong_type", "text", {"text": ["a"]}),
    ("wrong_type", "alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}),
    ("wrong_type", "prompt", {"prompt": "q", "answer": [1]}),
    ("wrong_type", "prompt", {"prompt": "q", "tests": [1]}),
    ("unknown_role", "messages", {"messages": [{"role": "narrator", "content": "x"}, ANSWER]}),
    ("null_content", "messages", {"messages": [USER, {"role": "assistant", "content": None}]}),
    ("null_content", "text", {"text": None}),
    ("null_content", "prompt_completion", {"prompt": "q", "completion": None}),
    ("empty_content", "messages", {"messages": [USER, {"role": "assistant", "content": " \n"}]}),
    ("empty_content", "text", {"text": " "}),
    ("empty_content", "alpaca", {"instruction": "", "output": "a"}),
    ("empty_content", "prompt_completion", {"prompt": "q", "completion": ""}),
    ("not_text", "messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}),
    ("empty_conversation", "messages", {"messages": []}),
    ("no_assistant", "messages", {"messages": [USER]}),
    ("no_assistant", "prompt_completion", {"prompt": "q", "completion": [USER]}),
    ("bad_tool_call", "messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}]}),
    ("bad_tool_call", "messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}),
    ("bad_tool_call", "messages", {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}]}),
    ("bad_tool_call", "sharegpt", {"conversations": [{"from": "function_call", "value": "f(x)"}]}),
    ("bad_tools", "messages", {"messages": [USER, ANSWER], "tools": "{"}),
    ("bad_tools", "messages", {"messages": [USER, ANSWER], "tools": [3]}),
    ("bad_weight", "messages", {"messages": [USER, {**ANSWER, "train": "yes"}]}),
    ("bad_weight", "messages", {"messages": [USER, {**ANSWER, "weight": -1}]}),
    ("bad_weight", "messages", {"messages": [USER, {**ANSWER, "train": float("nan")}]}),
    ("wrong_encoding", "messages", {"messages": [USER, {"role": "assistant", "content": "a\ud800"}]}),
    ("wrong_encoding", "messages", {"messages": [{**ANSWER, "tool_calls": [CALL | {"arguments": '{"": "\\ud800"}'}]}]}),
    ("wrong_encoding", "messages", {"messages": [USER, ANSWER], "tools": [{"name": "f", "description": "\ud800"}]}),
    ("no_question", "prompt", {"messages": [USER, ANSWER], "answer": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "row_format", "row"), REFUSED)
def test_law_8_a_bad_row_is_refused_under_a_stable_reason(reason, row_format, row):
    with pytest.raises(BadRow) as caught:
        read(row, row_format)
    assert caught.value.reason == reason and reason in REASONS


def test_every_reason_of_a_row_is_in_the_table():
    by_readers = {"broken_json", "not_an_object", "wrong_columns", "broken_csv"}
    by_rankings = {
        "bad_ranking",
        "bad_transcript",
        "not_ranked",
        "revised",
        "superseded",
    }  # tests/data/test_rankings.py
    by_prompts = {"pass_rate", "not_made"}  # tests/data/test_pass_rate.py, tests/data/test_gym.py
    assert {reason for reason, _, _ in REFUSED} | by_readers | by_rankings | by_prompts == set(REASONS)


@pytest.mark.parametrize(("reason", "row_format", "row"), [case for case in REFUSED if case[0] != "unknown_role"])
def test_no_refusal_quotes_the_row(reason, row_format, row):
    secret = json.loads(json.dumps(row).replace('"x"', '"sesame"').replace('"q"', '"sesame"'))
    with pytest.raises(BadRow) as caught:
        read(secret, row_format)
    assert "sesame" not in str(caught.value)


def test_a_missing_key_names_the_column_of_the_user():
    with pytest.raises(BadRow, match="column 'question'"):
        read({"prompt": "q", "completion": "a"}, "prompt_completion", columns={"prompt": "question"})


def test_a_role_mapped_to_no_role_is_refused():
    with pytest.raises(BadRow, match="robot"):
        read({"messages": [USER, {"role": "bot", "content": "x"}]}, roles={"bot": "robot"})
