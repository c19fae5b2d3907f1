"""Loops that take turns, and what their times say."""

from __future__ import annotations

import math
import time

import pytest

from benchmarks.overhead import ARMS, main, measure, overhead, result
from benchmarks.plan_check import Case
from benchmarks.turns import Turns


def test_loops_take_turns_and_each_is_timed_alone():
    order = []
    turns = Turns(("a", "b"))

    def loop(name: str, pause: float):
        def run() -> None:
            for _ in range(3):
                order.append(name)
                time.sleep(pause)
                turns.give(name)
                turns.take(name)

        return run

    turns.run({"a": loop("a", 0.05), "b": loop("b", 0.0)})
    assert order == ["a", "b"] * 3
    assert min(turns.seconds["a"]) >= 0.05 > max(turns.seconds["b"])
    assert max(turns.cpu_seconds["a"]) < 0.05  # sleeping is not working


def test_a_loop_that_ends_early_leaves_the_turns_to_the_others():
    turns, seen = Turns(("a", "b")), []

    def short() -> None:
        turns.give("a")
        turns.take("a")

    def long() -> None:
        for step in range(4):
            turns.give("b")
            turns.take("b")
            seen.append(step)

    turns.run({"a": short, "b": long})
    assert seen == [0, 1, 2, 3]


def test_a_loop_that_fails_ends_them_all_with_its_error():
    turns = Turns(("a", "b"))

    def wait() -> None:
        for _ in range(100):
            turns.give("a")
            turns.take("a")

    def fail() -> None:
        turns.give("b")
        turns.take("b")
        raise ZeroDivisionError("b's")

    with pytest.raises(ZeroDivisionError, match="b's"):
        turns.run({"a": wait, "b": fail})


def test_steps_that_log_are_paired_apart_and_weigh_their_share():
    theirs = [1.0, 2.0, 1.0, 1.0] * 5
    extra = [0.5 if number % 4 == 0 else 0.01 for number in range(5, 25)]
    ours = [each + more for each, more in zip(theirs, extra, strict=True)]
    found = overhead(ours, theirs, every=4, first=5)
    assert found["step"] == pytest.approx(0.01) and found["log"] == pytest.approx(0.5)
    assert found["mean"] == pytest.approx(0.01 + 0.49 / 4)
    assert found["error"] == pytest.approx(0, abs=1e-9)  # the pairs take away what moves both


@pytest.mark.timeout(200)
def test_the_three_loops_learn_from_the_same_batches():
    case = Case(name="tiny", layers=1, hidden=64, intermediate=128, heads=2, kv_heads=2, vocab=512, sequence=32)
    wall, processor = measure(case, steps=12, warmup=2, every=5, wandb=False)
    assert set(wall) == set(processor) == set(ARMS)
    assert all(len(values) == 10 and min(values) > 0 for values in (*wall.values(), *processor.values()))
    found = result(wall, processor, every=5, warmup=2)
    assert all(math.isfinite(value) for value in found["wall_full_over_bare"].values())


def test_too_few_steps_for_two_intervals_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--steps", "20", "--every", "10"])
    assert stop.value.code == 2 and "fewer than two logging intervals" in capsys.readouterr().err
