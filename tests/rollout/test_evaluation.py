"""pass@k and majority@k, against counting all ways to choose."""

from __future__ import annotations

import itertools

import pytest

from ptl.rollout.evaluation import Evaluation, measures, pass_at_k


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (4, 0), (4, 1), (5, 3), (6, 6)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(n, correct):
    right = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        chosen = list(itertools.combinations(right, k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_as_many_answers(k):
    with pytest.raises(ValueError, match=f"pass@{k} needs {k} answers or more, got 3"):
        pass_at_k(3, 1, k)


def test_the_majority_decides_and_the_earlier_of_equals():
    found = measures([False, True, True, False], ["7", "8", "8", "7"], [1, 3, 4])
    assert found["majority@1"] == (0.0, 1.0)  # "7" alone
    assert found["majority@3"] == (1.0, 1.0)  # "8" twice
    assert found["majority@4"] == (0.0, 1.0)  # two of each, and "7" came first
    assert found["pass@1"] == (0.5, 1.0) and found["pass@4"] == (1.0, 1.0)


def test_what_could_not_be_judged_is_no_wrong_answer():
    found = measures([None, True, None, True], ["1", "2", None, "2"], [1, 2, 4])
    assert found == {"pass@1": (1.0, 1.0), "pass@2": (1.0, 1.0), "majority@2": (1.0, 1.0), "majority@4": (1.0, 1.0)}
    assert measures([None, None], [None, None], [1, 2]) == {}


def test_every_k_has_a_name_and_the_number_of_answers_is_one():
    assert Evaluation(samples=8, k=[1, 4, 4]).ks == (1, 4, 8)
    assert "pass@8" in Evaluation(samples=8).names and "majority@1" in Evaluation(samples=8).names
