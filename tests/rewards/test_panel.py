"""The panel: sums, counts, time, and rewards that misbehave."""

from __future__ import annotations

import logging
import math
import threading
import time

import pytest
import torch

from ptl.rewards.base import Failure, Reward
from ptl.rewards.panel import RewardError, RewardPanel
from tests.rewards.parts import FAILED, completion

NAN = float("nan")


class Fixed(Reward):
    """Returns what it is given."""

    def __init__(self, outcomes, **how):
        super().__init__(**how)
        self.outcomes = outcomes

    def score(self, completions):
        if isinstance(self.outcomes, BaseException):
            raise self.outcomes
        return self.outcomes


class Measuring(Fixed):
    """Has something to log of a batch that it could judge."""

    measured = ("cut",)

    def score(self, completions):
        self.held = {"cut": (1.0, float(len(completions)))}
        return super().score(completions)

    def take_measures(self):
        return self.__dict__.pop("held", {})


class Slow(Reward):
    """Waits until it is told to go on."""

    seconds = 0.2

    def __init__(self, **how):
        super().__init__(**how)
        self.go_on, self.calls = threading.Event(), 0

    def score(self, completions):
        self.calls += 1
        self.go_on.wait(30)
        return [1.0] * len(completions)


def batch(n=3):
    return [completion("x", line=i + 1) for i in range(n)]


def judge(*rewards, n=3, limit=1.0):
    return RewardPanel(rewards, error_limit=limit).score(batch(n))


def same(found, wanted):
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(found, wanted, strict=True))


def test_the_total_is_the_weighted_sum_of_what_applies():
    judged = judge(
        Fixed([1.0, 0.0, None], weight=2.0, name="a"),
        Fixed([0.5, None, None], weight=-1.0, name="b"),
        Fixed([9, 9, 9], weight=0, name="c"),
    )
    assert judged.totals == [1.5, 0.0, 0.0]
    assert judged.outcomes["a"] == [1.0, 0.0, None]


def test_trap_grpo_13_no_reward_that_applies_is_no_reward_and_not_zero():
    judged = judge(Fixed([1.0, None, 0.0], name="a"), Fixed([None, None, None], name="b"))
    assert same(judged.totals, [1.0, NAN, 0.0])
    assert judged.metrics["reward"] == (1.0, 2.0)
    assert judged.errors == {}


def test_trap_grpo_13_an_error_takes_the_answer_out_and_is_counted():
    judged = judge(Fixed([1.0, FAILED, 1.0], name="a"), Fixed([1.0, 1.0, None], name="b"))
    assert same(judged.totals, [2.0, NAN, 1.0])
    assert judged.errors == {("a", "broken"): 1}


def test_what_is_measured():
    judged = judge(Fixed([1.0, None, 3.0, FAILED], name="a"), n=4)
    m = judged.metrics
    assert m["a"] == (4.0, 2.0) and m["a_square"] == (10.0, 2.0)
    assert m["a_absent"] == (1.0, 4.0) and m["a_error"] == (1.0, 4.0)
    assert m["a_ms"][0] >= 0 and m["a_ms"][1] == 4.0


@pytest.mark.parametrize(
    "outcomes, reason",
    [
        (ValueError("bad"), "raised"),
        (SystemExit(0), "raised"),
        ([1.0, 2.0], "wrong_length"),
        ([1.0] * 4, "wrong_length"),
        ([], "wrong_length"),
        (None, "wrong_type"),
        (1.0, "wrong_type"),
        ("abc", "wrong_type"),
    ],
)
def test_trap_grpo_13_a_reward_that_breaks_fails_for_the_whole_batch(outcomes, reason):
    judged = judge(Fixed(outcomes, name="a"), Fixed([1.0, 1.0, 1.0], name="b"))
    assert same(judged.totals, [NAN] * 3)
    assert judged.errors == {("a", reason): 3}
    assert judged.metrics["a"] == (0.0, 0.0)


@pytest.mark.parametrize(
    "value, reason",
    [(NAN, "not_finite"), (math.inf, "not_finite"), ("1", "wrong_type"), ([1], "wrong_type"), (10**400, "not_finite")],
)
def test_trap_grpo_13_one_bad_value_costs_one_answer(value, reason):
    judged = judge(Fixed([1.0, value, 0.0], name="a"))
    assert same(judged.totals, [1.0, NAN, 0.0]) and judged.errors == {("a", reason): 1}


def test_numbers_of_every_kind():
    judged = judge(Fixed([True, 2, torch.tensor(0.5)], name="a"))
    assert judged.totals == [1.0, 2.0, 0.5] and all(type(x) is float for x in judged.outcomes["a"])
    assert judge(Fixed(torch.tensor([1.0, 2.0, 3.0]), name="a")).totals == [1.0, 2.0, 3.0]


def test_a_reward_that_hangs_is_left_alone_and_asked_again_when_it_is_free():
    slow = Slow()
    panel = RewardPanel([slow], error_limit=1.0)
    began = time.monotonic()
    assert panel.score(batch()).errors == {("slow", "timeout"): 3}
    assert panel.score(batch()).errors == {("slow", "timeout"): 3}
    assert time.monotonic() - began < 5 and slow.calls == 1  # it is not called while it still works
    slow.go_on.set()
    panel._stuck["slow"].join(5)
    assert panel.score(batch()).totals == [1.0, 1.0, 1.0]


def test_too_many_errors_stop_the_run_with_what_to_do():
    panel = RewardPanel([Fixed([FAILED] + [1.0] * 3, name="a")], error_limit=0.1)
    for _ in range(10):
        panel.score(batch(4))
    with pytest.raises(
        RewardError, match=r"a failed for 11 of the last 44 answers \(11 broken\).*on purpose.*error_limit"
    ):
        panel.score(batch(4))


def test_a_rate_below_the_limit_goes_on_for_ever():
    panel = RewardPanel([Fixed([FAILED] + [1.0] * 9, name="a")], error_limit=0.1)
    for _ in range(50):
        panel.score(batch(10))


def test_a_verifier_that_breaks_late_is_found_at_once():
    reward = Fixed([1.0] * 8, name="a")
    panel = RewardPanel([reward], error_limit=0.1)
    for _ in range(100):
        panel.score(batch(8))
    reward.outcomes = RuntimeError("the disk is full")
    panel.score(batch(8))
    with pytest.raises(RewardError, match="the disk is full"):
        panel.score(batch(8))


@pytest.mark.parametrize("limit, stops", [(0.0, True), (1.0, False)])
def test_the_ends_of_the_limit(limit, stops):
    panel = RewardPanel([Fixed([FAILED] * 3, name="a")], error_limit=limit)
    if stops:
        with pytest.raises(RewardError):
            panel.score(batch())
    else:
        for _ in range(60):
            panel.score(batch())


def test_the_first_failure_of_a_kind_is_told_with_its_place(caplog):
    panel = RewardPanel([Fixed([1.0, FAILED, FAILED], name="a")], error_limit=1.0)
    with caplog.at_level(logging.WARNING):
        panel.score(batch())
        panel.score(batch())
    assert len(caplog.records) == 1
    assert "questions.jsonl:2" in caplog.text and "on purpose" in caplog.text and "broken" in caplog.text


def test_no_answers_are_no_error():
    judged = judge(Fixed([1.0], name="a"), n=0)
    assert judged.totals == [] and judged.errors == {}


def test_rewards_have_names_and_weights():
    assert Slow().name == "slow" and Slow(name="other").name == "other"
    with pytest.raises(ValueError, match="no reward"):
        RewardPanel([])
    with pytest.raises(ValueError, match="'slow'"):
        RewardPanel([Slow(), Slow()])
    with pytest.raises(ValueError, match="nothing to learn"):
        RewardPanel([Slow(weight=0.0)])
    with pytest.raises(ValueError, match="error_limit"):
        RewardPanel([Slow()], error_limit=1.5)
    with pytest.raises(ValueError, match="finite"):
        Slow(weight=NAN)


def test_closing_the_panel_closes_its_rewards():
    closed = []

    class Closing(Fixed):
        def close(self):
            closed.append(self.name)

    RewardPanel([Closing([], name="a"), Closing([], name="b")]).close()
    assert closed == ["a", "b"]


def test_a_failure_is_what_it_says():
    assert Failure("timeout").reason == "timeout"


# ---- what a reward measures itself ----


def test_what_a_reward_measures_stands_under_its_name():
    panel = RewardPanel([Measuring([1.0, 0.0], name="a"), Fixed([1.0, 1.0], name="b")])
    metrics = panel.score([completion("a"), completion("b")]).metrics
    assert metrics["a_cut"] == (1.0, 2.0) and "b_cut" not in metrics
    assert set(metrics) == set(panel.metric_names)
    assert "a_cut" not in panel.score([]).metrics  # nothing was asked, so nothing is measured again
