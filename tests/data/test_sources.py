"""The source a user writes, and how the format of its rows is told."""

import subprocess
import sys

import pytest

from ptl.data.sources import FIELDS, FORMATS, RECORD_OF, Source, check_record, detect_format, renamed
from ptl.types import Conversation, Prompt, Ranking

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = {
    "messages": [{"messages": TURNS, "prompt": "q", "prompt_id": "1"}, {"messages": TURNS, "tools": None}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}]}, {"messages": [{"from": "gpt", "value": "a"}]}],
    "alpaca": [{"instruction": "q", "input": "", "output": "a", "text": "all of it"}],
    "prompt_completion": [{"prompt": "q", "completion": "a"}, {"prompt": TURNS[:1], "completion": TURNS[1:]}],
    "text": [{"text": "words", "url": "x"}],
    "ranking": [
        {"chosen": "a", "rejected": "b", "prompt": "q"},
        {"prompt": "q", "completions": ["a"], "scores": [1]},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "answer": "x"},
        {"prompt": TURNS[:1], "completions": [{"messages": TURNS[1:], "rank": None, "meta": {}}], "annotator": None},
        {"prompt": "q", "completions": [{"response": "a", "overall_score": 5.0}]},
        {"instruction": "q", "completions": [{"response": "a", "overall_score": 5.0}], "source": "x"},
        {"chosen": TURNS, "rejected": TURNS, "messages": TURNS, "prompt": "q", "score_chosen": 1, "score_rejected": 0},
        {"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"], "subset": "Math", "num_correct": 1},
    ],
    "prompt": [{"question": "q", "answer": "1"}, {"prompt": "q", "test_list": ["assert f"]}, {"prompt": "q"}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_told_from_the_rows(name):
    assert detect_format(Source(path="x"), ROWS[name]) == name
    for row in ROWS[name]:
        assert detect_format(Source(path="x"), [row]) == name


def test_answers_without_any_order_are_no_ranking():
    assert detect_format(Source(path="x"), [{"prompt": "q", "completions": ["a", "b"]}]) == "prompt"


def test_every_format_has_fields_and_a_record():
    assert set(FORMATS) == set(FIELDS) == set(RECORD_OF) == set(ROWS)


def test_a_few_odd_rows_do_not_decide_the_format():
    """A row whose completion is null looks like a prompt; it is to be refused, not to confuse."""
    rows = [{"prompt": "q", "completion": "a"}] * 2 + [{"prompt": "q", "completion": None}]
    assert detect_format(Source(path="x"), rows) == "prompt_completion"


def test_a_named_format_is_not_doubted():
    assert detect_format(Source(path="x", format="text"), ROWS["alpaca"]) == "text"


def test_columns_are_renamed_before_the_format_is_told():
    source = Source(path="x", columns={"prompt": "question", "completion": "answer"})
    assert detect_format(source, ROWS["prompt"][:1]) == "prompt_completion"


def test_a_renamed_column_takes_the_place_of_one_of_that_name():
    row = {"question": "q", "prompt": "other", "answer": "a"}
    assert dict(renamed(row, {"prompt": "question"})) == {"prompt": "q", "answer": "a"}
    assert dict(renamed(row, {"prompt": "absent"})) == {"question": "q", "answer": "a"}


def test_null_columns_do_not_decide_the_format():
    """An Arrow table of a mixture has the columns of all its parts."""
    row = {"messages": TURNS, "chosen": None, "rejected": None, "text": None}
    assert detect_format(Source(path="x"), [row]) == "messages"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"foo": 1, "bar": 2}], "keys are ['bar', 'foo']"),
        ([], "no format fits"),
        (ROWS["text"] + ROWS["alpaca"], "several formats"),
    ],
)
def test_rows_of_no_one_format_are_refused_with_the_key_to_set(rows, told):
    with pytest.raises(ValueError, match="format") as caught:
        detect_format(Source(path="my.jsonl"), rows)
    assert told in str(caught.value) and "my.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("made", "wanted"), [("prompt", Conversation), ("ranking", Conversation), ("messages", Ranking), ("text", Prompt)]
)
def test_a_record_that_the_objective_does_not_eat_is_refused(made, wanted):
    with pytest.raises(ValueError, match="learns from") as caught:
        check_record(Source(path="x"), made, wanted)
    assert "format" in str(caught.value) and "columns" in str(caught.value)
    check_record(Source(path="x"), made, RECORD_OF[made])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"path": ""}, "path"),
        ({"format": "chatml"}, "format"),
        ({"weight": 0.0}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"limit": 0}, "limit"),
        ({"columns": {"questoin": "q"}}, "columns"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options, told):
    with pytest.raises(ValueError, match=told):
        Source(**{"path": "x", **options})


def test_the_source_is_light_to_import():
    code = (
        "import sys, ptl.data.sources, ptl.apps.data; "
        "print([m for m in ('torch','transformers','datasets','numpy','rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.strip() == "[]"
