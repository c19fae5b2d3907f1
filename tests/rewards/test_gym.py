"""A data set's own scorer: right, wrong and hostile answers, and questions that it cannot judge."""

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ptl.data.gym import UNSTEADY, GymRange
from ptl.data.records import parse_row
from ptl.data.sources import BadRow, Source
from ptl.rewards import gym
from ptl.rewards.base import Completion, Failure
from ptl.rewards.gym import GymScore
from ptl.rewards.gym_check import FOOLED, FORMULAS, LISTS, SUMS, harmless
from ptl.types import Message, Origin
from tests.rewards.parts import completion

SOURCE = Source(path="gym://", format="prompt")


@pytest.fixture(scope="module")
def reward():
    made = GymScore(seconds_each=10.0)
    yield made
    made.close()


def prompts(name, count=4, start=0, **config):
    rows = GymRange(name, json.dumps({"seed": 0, **config}), start, count).rows()
    return [parse_row(row, "prompt", SOURCE, Origin(f"gym://{name}", line)) for line, row in rows]


def answered(prompt, text):
    return Completion(prompt=prompt, text=text)


def scores(reward, name, *texts, **config):
    """What the first question's answers are worth."""
    (prompt,) = prompts(name, 1, **config)
    return reward.score([answered(prompt, text) for text in texts])


def test_right_wrong_none_and_not_applicable(reward):
    asked = prompts("chain_sum", 2, min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    right = [answered(prompt, f"<think>hm</think>So the answer is {prompt.answer}.") for prompt in asked]
    wrong = [answered(prompt, "#### x") for prompt in asked]
    silent = answered(asked[0], "<think>12")
    assert reward.score([*right, *wrong, silent, completion("4", "4")]) == [1.0, 1.0, 0.0, 0.0, 0.0, None]


@pytest.mark.parametrize("name", ["arc_agi", "rearc", "rectangle_count", "letter_counting", "countdown", "n_queens"])
def test_the_expected_answers_are_right_though_rows_went_through_json(reward, name):
    """Data sets that compare tuples would find lists in a row that was written and read."""
    asked = prompts(name)
    assert reward.score([answered(prompt, f"<answer>{prompt.answer}</answer>") for prompt in asked]) == [1.0] * 4


def test_answers_may_differ_from_the_expected_one_where_the_data_set_says_so(reward):
    (prompt,) = prompts("countdown", 1, min_numbers=2, max_numbers=2)
    a, op, b = re.fullmatch(r"(\d+)\s*([-+*/])\s*(\d+)", prompt.answer).groups()
    other = f"({b} + {a})" if op == "+" else f"({a}) {op} ({b})"
    assert reward.score([answered(prompt, other), answered(prompt, f"{a} + {b} + 1")]) == [1.0, 0.05]


def test_an_answer_that_the_scorer_stumbles_over_is_wrong(reward):
    assert scores(reward, "prime_factorization", "I do not know") == [0.0]


@pytest.mark.parametrize("name", FOOLED)
def test_a_scorer_that_is_fooled_is_refused(reward, name):
    (outcome,) = scores(reward, name, "0")
    assert isinstance(outcome, Failure) and "ExactMatch" in outcome.detail


CODE = "__import__('pathlib').Path({path!r}).touch()"
TRICKS = [
    "{code}",
    "[{code}]",
    "[[{code}]]",
    "[x for x in [{code}]]",
    "[{path!r} for __builtins__['len'] in [[open]]]",
    "1 + {code}",
    "Symbol({code})",
    "x + exec({code!r})",
    "sin.__init__.__globals__",
    "[1, 2, 3].append({code}) or [1]",
    "f'{{{code}}}'",
]


@pytest.mark.parametrize("name", [*LISTS, *SUMS, *FORMULAS])
def test_no_answer_is_run(reward, tmp_path, name):
    path = str(tmp_path / "touched")
    texts = [trick.format(code=CODE.format(path=path), path=path) for trick in TRICKS]
    found = scores(reward, name, *[f"<answer>{text}</answer>" for text in texts])
    assert all(isinstance(score, float) and score < 0.1 for score in found) and not Path(path).exists()


@pytest.mark.parametrize("name", [*LISTS, *SUMS, *FORMULAS])
def test_what_is_asked_for_may_be_answered(name):
    answers = [prompt.answer for prompt in prompts(name, 2 if name == "puzzle24" else 12)]
    # Where the package found no closed form it expects the integral itself, which would also answer every question.
    assert all(harmless(name, answer) for answer in answers if "Integral" not in answer)
    assert harmless("string_insertion", "['A', 'B']") and harmless("countdown", "(1 + 2.5)*3 - 4/2")
    assert not harmless("countdown", "9**9") and not harmless("simple_integration", "Integral(x, x)")
    assert harmless("simple_integration", "x**2*exp(x)/2 + C") and not harmless("simple_integration", "x.evalf(9)")


def test_every_scorer_that_runs_an_answer_is_known():
    """Another version of the package has to be read again: see ``VERSION``."""
    folder = Path(find_spec("reasoning_gym").submodule_search_locations[0])
    doubtful = re.compile(r"(?<!def )(?<!\w)(eval|exec|parse_expr|sympify|parse_latex|__import__)\(|pickle|yaml\.load")
    found = {path.stem for path in folder.rglob("*.py") if doubtful.search(path.read_text())}
    # These run what they made themselves, or have a function of that name.
    own = {"basic_arithmetic", "bitwise_arithmetic", "generators_00_49", "generators_50_99", "number_sorting"}
    own |= {"codeio", "propositional_logic"}
    assert found - own == {*LISTS, *SUMS, *FORMULAS, "polynomial_multiplication"}
    assert {"codeio", "polynomial_multiplication"} <= set(UNSTEADY)


def test_a_judge_that_hangs_is_killed_and_the_rest_is_judged():
    patient = GymScore(seconds_each=3.0)
    (prompt,) = prompts("simple_integration", 1)
    texts = (prompt.answer, "9**9**9**9*x + C", prompt.answer)
    outcomes = patient.score([answered(prompt, f"<answer>{text}</answer>") for text in texts])
    patient.close()
    assert [outcomes[0], outcomes[2]] == [1.0, 1.0] and outcomes[1].reason in ("timeout", "died")


def test_a_question_that_the_package_does_not_make_is_a_failure(reward):
    (prompt,) = prompts("chain_sum", 1)
    other = prompt.messages[0].content.replace("arithmetic", "")
    changed = Completion(prompt=replace(prompt, messages=(Message(role="user", content=other),)), text=prompt.answer)
    longer = Message(role="user", content=f"{prompt.messages[0].content}\nAnswer in a box.")
    outcomes = reward.score([changed, Completion(prompt=replace(prompt, messages=(longer,)), text=prompt.answer)])
    assert outcomes[0].reason == "raised" and "another question" in outcomes[0].detail and outcomes[1] == 1.0


@pytest.mark.parametrize("made_from", [3, {"dataset": "chain_sum"}, {"dataset": "a", "config": 3, "index": "x"}])
def test_a_gym_column_of_another_form_is_a_failure(reward, made_from):
    (outcome,) = reward.score([completion("4", "4", gym=made_from)])
    assert outcome.reason == "bad_gym" and "gym://" in outcome.detail


def test_a_data_set_that_is_none_is_a_failure(reward):
    (outcome,) = reward.score([completion("4", "4", gym={"dataset": "chain", "config": {}, "index": 0})])
    assert outcome.reason == "raised" and "no data set 'chain'" in outcome.detail


def test_without_the_package_or_with_another_version_it_is_refused(monkeypatch):
    monkeypatch.setattr(gym, "VERSION", "0.1.1")
    with pytest.raises(ValueError, match=r"pip install 'ptl\[gym\]'"):
        GymScore()
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs reasoning-gym"):
        GymScore()


@pytest.mark.slow
def test_every_data_set_gives_its_own_answers_1_and_no_other_scorer_is_fooled():
    from reasoning_gym.factory import DATASETS

    judge = GymScore(seconds_each=60.0)
    for name in sorted(set(DATASETS) - {"composite", *UNSTEADY, *FOOLED}):
        asked = prompts(name, 3, seed=3)
        assert not any(isinstance(prompt, BadRow) for prompt in asked)
        right = [prompt for prompt in asked if prompt.answer is not None and "Integral" not in prompt.answer]
        given = [answered(prompt, f"Thus <answer>{prompt.answer}</answer>") for prompt in right]
        assert judge.score(given) == [1.0] * len(right), name
        guesses = ("I do not know", "{}", "[[]]", "nan", "x", "inf")
        found = judge.score([answered(prompt, guess) for prompt in asked for guess in guesses])
        assert all(isinstance(score, float) and 0.0 <= score < 0.5 for score in found), (name, found)
    judge.close()
