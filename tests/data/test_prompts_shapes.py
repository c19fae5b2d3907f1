"""Rows of well-known sets of questions: read as prompts, judged by their own tests and answers, and rows again."""

import json

import pytest

from ptl.data.records import parse_row, row_of
from ptl.data.sources import Source, detect_format
from ptl.rewards.base import Completion
from ptl.rewards.code import CodeTests
from ptl.rewards.maths import ExactMatch, MathVerify
from ptl.types import Origin
from tests.rewards.sandbox_here import sandbox_holds  # noqa: F401  (a fixture for all of this module)

GSM8K = [
    {
        "question": "A pack holds 12 pens. How many pens do 6 packs hold?",
        "answer": "6 packs hold 6 * 12 = <<6*12=72>>72 pens.\n#### 72",
    },
    {
        "question": "A car costs $11,000 and loses $1,500. What is it worth?",
        "answer": "11000 - 1500 = <<11000-1500=9500>>9500\n#### 9,500",
    },
]
MBPP = [
    {
        "task_id": 1,
        "text": "Write a function to find the shared elements of two tuples.",
        "code": "def shared_elements(a, b):\r\n  return tuple(set(a) & set(b))",
        "test_setup_code": "",
        "test_list": [
            "assert set(shared_elements((3, 4, 5), (5, 7, 4))) == set((4, 5))",
            "assert set(shared_elements((1, 2), (2, 9))) == set((2,))",
        ],
        "challenge_test_list": [],
    },
    {
        "task_id": 2,
        "source_file": "b.ipynb",
        "prompt": "Write a function to sum two numbers.",
        "code": "import math\ndef sum(a, b):\n    return math.floor(a + b)",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(sum(10, 15), 25)", "assert sum(-1, 1) == 0"],
    },
]
HUMANEVAL = {
    "task_id": "Test/0",
    "prompt": 'def longest(words: list[str]) -> str:\n    """The longest of some words.\n    >>> longest(["a", "bb"])\n'
    '    \'bb\'\n    """\n',
    "entry_point": "longest",
    "canonical_solution": "    return max(words, key=len)\n",
    "test": "METADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    assert candidate(['a', 'bb']) == 'bb'\n"
    "    assert candidate(['ccc', 'bb']) == 'ccc'\n",
}
SOURCE = Source(path="rows.jsonl")


def read(row, source=SOURCE):
    """The prompt of a row as a file holds it, with the format told from the row."""
    row = json.loads(json.dumps(row))
    assert detect_format(source, [row]) == "prompt"
    return parse_row(row, "prompt", source, Origin("rows.jsonl", 1))


def judged(reward, prompt, *texts):
    return reward.score([Completion(prompt=prompt, text=text) for text in texts])


@pytest.fixture(scope="module")
def code_tests():
    return CodeTests(seconds_each=30.0)


def fenced(code):
    return f"Here it is.\n```python\n{code}\n```"


@pytest.mark.parametrize(("row", "answer"), zip(GSM8K, ("72", "9,500")))
def test_gsm8k(row, answer):
    prompt = read(row)
    (message,) = prompt.messages
    assert (message.role, message.content, prompt.answer) == ("user", row["question"], answer)
    assert prompt.meta == {"solution": row["answer"]}
    maths = MathVerify()
    assert judged(maths, prompt, row["answer"], f"It is {answer}.\n#### {answer}.0", "#### 71") == [1.0, 1.0, 0.0]


def test_mbpp_of_both_kinds(code_tests):
    for row in MBPP:
        prompt = read(row)
        broken = row["code"].replace("&", "|").replace("a + b", "a - b")
        assert judged(code_tests, prompt, fenced(row["code"]), fenced(broken)) == [1.0, 0.0]
        assert prompt.tests == tuple(row["test_list"]) and prompt.answer is None
        assert prompt.meta["code"] == row["code"] and row["code"] not in prompt.messages[0].content


def test_mbpp_tells_what_to_call_the_function_and_nothing_that_is_expected():
    told = [read(row).messages[0].content for row in MBPP]
    assert told[0] == f"{MBPP[0]['text']}\n\nYour program is called like this: `shared_elements((3, 4, 5), (5, 7, 4))`"
    assert told[1] == f"{MBPP[1]['prompt']}\n\nYour program is called like this: `sum(10, 15)`"


@pytest.mark.parametrize(
    "question",
    ["Write shared_elements.", "Write `sum`.", "Write a function sum(a, b).", "def sum(a, b):\n    ..."],
)
def test_a_question_that_names_the_function_is_left_as_it_is(question):
    tests = MBPP["sum" in question]["test_list"]
    assert read({"prompt": question, "tests": tests}).messages[0].content == question


@pytest.mark.parametrize("tests", [["assert f("], ["x = 1"], ["assert open('a').read() == f"], ["assert True"]])
def test_tests_that_cannot_be_split_change_no_question(tests):
    """The reward counts them as failures."""
    prompt = read({"prompt": "Write it.", "test_list": tests, "test_setup_code": 3})
    assert prompt.messages[0].content == "Write it." and prompt.tests == tuple(tests)


def test_the_function_is_named_behind_the_last_turn():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "Write it."}]
    first, last = read({"prompt": turns, "tests": "assert f(1) == 2"}).messages
    assert first.content == "s" and last.content.endswith("`f(1)`")


def test_humaneval(code_tests):
    prompt = read(HUMANEVAL)
    (message,) = prompt.messages
    assert message.content == HUMANEVAL["prompt"] and prompt.tests == (HUMANEVAL["test"],)
    assert prompt.meta["canonical_solution"] == HUMANEVAL["canonical_solution"]
    body = HUMANEVAL["canonical_solution"]
    whole, broken = HUMANEVAL["prompt"] + body, HUMANEVAL["prompt"] + body.replace("max", "min")
    assert judged(code_tests, prompt, fenced(whole), fenced(body), fenced(broken)) == [1.0, 1.0, 0.0]


def test_a_problem_and_a_ground_truth():
    prompt = read({"problem": "What is 1/2 + 1/3?", "answer": r"\frac{5}{6}", "solution": "add", "level": 1})
    assert prompt.messages[0].content == "What is 1/2 + 1/3?" and prompt.meta == {"solution": "add", "level": 1}
    prompt = read({"prompt": [{"role": "user", "content": "q"}], "ground_truth": "a b", "data_source": "x"})
    assert judged(ExactMatch(), prompt, "A b.", "b") == [1.0, 0.0] and prompt.meta == {"data_source": "x"}


def test_hashes_belong_to_gsm8k_alone():
    gym = {"dataset": "x", "config": {}, "index": 0}
    assert read({"question": "q", "answer": "#### 3", "gym": gym}).answer == "#### 3"
    assert read({"prompt": "q", "answer": "#### 3"}).answer == "#### 3"


ROWS = [*GSM8K, *MBPP, HUMANEVAL, {"question": "q", "answer": "1", "system": "s", "gym": {"dataset": "x"}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ROWS.append({"prompt": [{"role": "user", "content": "q"}], "answer": 3, "tools": [TOOL], "level": None})


@pytest.mark.parametrize("row", ROWS)
def test_a_prompt_is_a_row_again(row):
    """What an evaluation writes beside a pass rate is itself data."""
    prompt = read(row)
    again = read({**row_of(prompt), "pass_rate": 0.5})
    assert again == read(row_of(again)) and again.meta == {**prompt.meta, "pass_rate": 0.5}
    assert (again.messages, again.answer, again.tests, again.tools) == (
        *(prompt.messages, prompt.answer, prompt.tests, prompt.tools),
    )
