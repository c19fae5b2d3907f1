"""Right answers, wrong ones, tricks, and a verifier that hangs."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import pytest

from ptl.rewards.maths import Check, ExactMatch, MathVerify, equal, judged_at_once, number_of
from ptl.rewards.panel import RewardPanel
from tests.rewards.parts import completion


@pytest.fixture(scope="module")
def maths():
    reward = MathVerify(seconds_each=3.0)
    yield reward
    reward.close()


def exact(text, answer):
    return ExactMatch().score([completion(text, answer)])[0]


def test_exact_match():
    assert exact("Paris", "Paris") == exact("  paris. ", "Paris") == exact("<think>Rome?</think>Paris", "Paris") == 1.0
    assert exact("The answer is New\nYork", "new york") == 0.0
    assert exact("The answer is  New  York.", "new york") == exact(r"\boxed{B}", "B") == 1.0
    assert exact("Paris or Rome", "Paris") == exact("", "Paris") == exact("Par", "Paris") == 0.0
    assert exact("anything", None) is None
    assert exact("#### 4", "2 and 2\n#### 4") == 1.0


NUMBERS = [
    ("72", 72, False),
    ("-72.50", Fraction(-145, 2), False),
    ("+3", 3, False),
    ("1,234,567.5", Fraction(2469135, 2), False),
    ("1{,}234", 1234, False),
    ("$1,000", 1000, False),
    (r"\$5", 5, False),
    ("$5$", 5, False),
    (r"\(5\)", 5, False),
    (".5", Fraction(1, 2), False),
    ("3/4", Fraction(3, 4), False),
    ("- 3 / 4", Fraction(-3, 4), False),
    (r"\frac{3}{4}", Fraction(3, 4), False),
    (r"-\dfrac{3}{4}", Fraction(-3, 4), False),
    ("50%", 50, True),
    (r"50 \%", 50, True),
    ("−7", -7, False),
    ("7.", 7, False),
    ("0072", 72, False),
]


@pytest.mark.parametrize("text, value, percent", NUMBERS)
def test_numbers_that_are_read(text, value, percent):
    assert number_of(text) == (value, percent)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "3,5",
        "1,23",
        "1 2",
        "72 73",
        "1e3",
        "3/0",
        "2x",
        "--3",
        "1/2/3",
        r"2\frac{1}{2}",
        r"\frac{1}{2}3",
        "\\frac{1}{2} 3",
        "9" * 200,
        "$",
    ],
)
def test_numbers_that_are_not(text):
    assert number_of(text) is None


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("72", "72.0", True),
        ("1000", "1,000", True),
        ("72", "73", False),
        ("123456789012345678", "123456789012345679", False),
        ("0.5", "1/2", True),
        ("0.333333", "1/3", True),
        ("0.3333", "1/3", False),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("50%", "5", False),
        ("50%", "50 %", True),
        ("0.5%", "50%", False),
    ],
)
def test_equality_of_numbers(a, b, same):
    assert equal(number_of(a), number_of(b)) is equal(number_of(b), number_of(a)) is same


RIGHT = [
    ("72", "72"),
    ("So she sold 48 + 24 = 72 clips.\n#### 72", "48/2 = 24 and 48 + 24 = 72\n#### 72"),
    ("She sold 72 clips", "72"),
    ("#### 72 clips", "72"),
    ("The answer is $72.00.", "72"),
    (r"\boxed{1,000}", "1000"),
    (r"<think>\boxed{3}</think> It is \boxed{72}.", "72"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\frac12}", "1/2"),
    (r"\boxed{2\frac{1}{2}}", r"\frac{5}{2}"),
    (r"\boxed{2 \frac{1}{2}}", "2.5"),
    ("The answer is 3*x+2.", "3x+2"),
    ("The answer is $3x + 2$", "2+3x"),
    (r"<answer>\sqrt{12} cm</answer>", r"2\sqrt{3}"),
    (r"The answer is \frac{1}{2}", r"\frac{2}{4}"),
    ("The answer is 50%", "0.5"),
    (r"\boxed{50\%}", r"\frac{1}{2}"),
    (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
    (r"\boxed{x^2 + 2x + 1}", r"(x+1)^2"),
    (r"\boxed{(3, 4)}", "(3,4)"),
    (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{72 \text{ apples}}", "72"),
    (r"\boxed{\text{B}}", "B"),
    (r"$\sqrt{16}$ is the answer", "4"),
    (r"\boxed{\pi}", r"\pi"),
    (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}"),
]
WRONG = [
    ("73", "72"),
    ("", "72"),
    ("I do not know", "72"),
    ("<think>72</think>", "72"),
    ("<think>72", "72"),
    (r"\boxed{72}, or rather \boxed{73}", "72"),
    (r"\boxed{72 \text{ or } 73}", "72"),
    (r"\boxed{71, 72, 73}", "72"),
    (r"\boxed{72, 73}", "72"),
    (r"\boxed{\{71, 72\}}", "72"),
    (r"\boxed{[0, 100]}", "72"),
    (r"\boxed{x}", "72"),
    (r"\boxed{x = x}", "72"),
    (r"\boxed{72 = 73}", "72"),
    (r"\boxed{x < 100}", "72"),
    (r"\boxed{70 \pm 2}", "72"),
    (r"\boxed{72 \lor 73}", "72"),
    (r"\boxed{x \in [0, 100]}", "72"),
    (r"\boxed{a = 72, b = 73}", "72"),
    ("The answer is 71, 72 or 73", "72"),
    ("$71$, $72$ and $73$", "72"),
    (r"\boxed{\text{any number}}", "72"),
    (r"\boxed{\text{nan}}", "72"),
    (r"\boxed{\infty}", "72"),
    (r"\boxed{0/0}", "72"),
    (r"\boxed{7 2}", "72"),
    (" ".join(map(str, range(100))), "72"),
    ("72 " * 5000 + "73", "72"),
    (r"\boxed{" + "1+" * 600 + "1}", "601"),  # longer than any answer
    ("The answer is " + "1+" * 600 + "1", "601"),
    (r"\boxed{\frac{1}{3}}", "0.3333"),
    ("72 __import__('os').system('true')  73", "72"),
]


@pytest.mark.parametrize("text, answer", RIGHT)
def test_right_answers_are_right(maths, text, answer):
    assert maths.score([completion(text, answer)]) == [1.0]


@pytest.mark.parametrize("text, answer", WRONG)
def test_wrong_answers_and_tricks_are_not(maths, text, answer):
    assert maths.score([completion(text, answer)]) == [0.0]


@pytest.mark.parametrize(
    "text, answer, value",
    [
        ("72", "72", 1.0),
        ("So 72.\n#### 72", "#### 72", 1.0),
        (r"\boxed{1,000}", "1000", 1.0),
        ("The answer is $71", "72", 0.0),
    ],
)
def test_numbers_need_no_process(text, answer, value):
    assert judged_at_once(completion(text, answer)) == value
    assert isinstance(judged_at_once(completion(r"\boxed{\sqrt{4}}", answer)), Check)


def test_a_question_without_an_answer_is_not_for_it(maths):
    assert maths.score([completion("72", None)]) == [None]


def test_an_expected_answer_that_is_no_mathematics_is_an_error_and_not_a_wrong_answer(maths):
    found = maths.score([completion(r"\boxed{72}", "$$"), completion(r"\boxed{72}", "  ")])
    assert [outcome.reason for outcome in found] == ["raised", "bad_answer"]
    assert "ExactMatch" in found[0].detail


def test_a_verifier_that_hangs_is_killed_and_the_rest_is_judged(maths):
    """The power holds the interpreter, so that no alarm within the process is heard; the next answer gets a new one."""
    batch = [
        completion(r"\boxed{\sqrt{4}}", "2"),
        completion(r"\boxed{9^{9^{9^{9}}} + x}", "3x"),
        completion(r"\boxed{\sqrt{9}}", "3"),
        completion(r"\boxed{\sqrt{9}}", "4"),
    ]
    began = time.monotonic()
    judged = RewardPanel([maths], error_limit=1.0).score(batch)
    assert time.monotonic() - began < 30
    assert [judged.totals[i] for i in (0, 2, 3)] == [1.0, 1.0, 0.0] and math.isnan(judged.totals[1])
    assert judged.errors == {("math_verify", "timeout"): 1} and judged.metrics["math_verify_error"] == (1.0, 4.0)


def test_the_same_answer_is_checked_once(maths, monkeypatch):
    jobs = []
    monkeypatch.setattr(maths._workers, "run", lambda given: jobs.extend(given) or [0.25] * len(given))
    batch = [completion(text, "2") for text in (r"\boxed{\sqrt{4}}", "2", r"\boxed{\sqrt{4}}", r"\boxed{\sqrt{5}}")]
    assert maths.score(batch) == [0.25, 1.0, 0.25, 0.25] and len(jobs) == 2
