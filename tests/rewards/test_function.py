"""Functions in processes of their own: whatever they do, the batch ends and every answer has an outcome."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from ptl.rewards.base import Failure
from ptl.rewards.function import PythonFunction
from ptl.rewards.panel import RewardPanel
from ptl.rewards.workers import Workers
from tests.rewards.parts import completion

BEHAVES = "tests.rewards.parts.behaves"


@pytest.fixture(scope="module")
def workers():
    pool = Workers(BEHAVES, count=2, seconds=1.5)
    yield pool
    pool.close()


def texts(*values):
    return [completion(value) for value in values]


def test_any_function_by_its_path():
    reward = PythonFunction(function="tests.rewards.parts.length", processes=2)
    assert reward.name == "length"
    assert reward.score(texts(*("x" * n for n in range(20)))) == [float(n) for n in range(20)]
    assert reward.score([]) == []
    reward.close()
    assert reward.score(texts("again")) == [5.0]
    reward.close()


@pytest.mark.parametrize(
    "behaviour, reason",
    [("raise", "raised"), ("exit", "raised"), ("die", "died"), ("text", "wrong_type"), ("list", "wrong_type")],
)
def test_trap_grpo_13_what_goes_wrong_costs_one_answer(workers, behaviour, reason):
    before, found, after = workers.run(texts("fine", behaviour, "fine"))
    assert before == after == 0.5 and isinstance(found, Failure) and found.reason == reason
    assert behaviour != "raise" or "KeyError" in found.detail


@pytest.mark.parametrize("behaviour", ["sleep", "loop", "regex", "power"])
def test_what_hangs_is_killed_even_where_it_holds_the_interpreter(workers, behaviour):
    began = time.monotonic()
    found = workers.run(texts("fine", behaviour, "fine", "fine"))
    assert time.monotonic() - began < 20
    assert found[0] == found[2] == found[3] == 0.5 and found[1].reason == "timeout"


def test_what_it_leaves_behind_is_killed_too(workers, tmp_path):
    found = workers.run([completion("fork", file=str(tmp_path / "child")), completion("fine")])
    assert found[1] == 0.5 and found[0].reason in ("died", "timeout")
    status = Path("/proc", (tmp_path / "child").read_text(), "status")
    deadline = time.monotonic() + 10
    while (alive := status.exists() and "State:\tZ" not in status.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive


def test_values_of_every_kind(workers):
    none, true, nan = workers.run(texts("none", "true", "nan"))
    assert none is None and true == 1.0 and math.isnan(nan)


def test_what_it_prints_or_reads_is_not_taken_for_an_outcome(workers):
    assert workers.run(texts("print", "input", "fine", "print")) == [0.5, 0.0, 0.5, 0.5]


def test_processes_are_kept_between_batches_and_shared(workers):
    workers.run(texts("fine", "fine"))
    first = {workers.run(texts("pid"))[0] for _ in range(3)}
    assert len(first) == 1 and os.getpid() not in first
    assert first == set(workers.run(texts("pid")))


def test_a_process_that_died_between_batches_is_replaced():
    pool = Workers(BEHAVES, count=1, seconds=2.0)
    (pid,) = pool.run(texts("pid"))
    os.kill(int(pid), 9)
    time.sleep(0.1)
    assert pool.run(texts("fine", "fine")) == [0.5, 0.5]
    pool.close()


def test_processes_end_with_their_owner():
    pool = Workers(BEHAVES, count=1, seconds=2.0)
    (pid,) = pool.run(texts("pid"))
    del pool
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_what_cannot_be_sent_is_a_failure(workers):
    odd = completion("fine", key=lambda: None)
    found = workers.run([odd, completion("fine")])
    assert found[0].reason == "raised" and "cannot be sent" in found[0].detail and found[1] == 0.5


@pytest.mark.parametrize("path", ["tests.rewards.parts.absent", "tests.rewards.parts.NOT_CALLABLE", "nowhere"])
def test_a_function_that_is_not_there_says_so(path):
    pool = Workers(path, count=1, seconds=2.0)
    with pytest.raises(RuntimeError, match="cannot be started: ImportError"):
        pool.run(texts("fine"))
    panel_reward = PythonFunction(function="tests.rewards.parts.absent")
    judged = RewardPanel([panel_reward], error_limit=1.0).score(texts("fine"))
    assert judged.errors == {("absent", "raised"): 1}


@pytest.mark.parametrize("path", ["no.such.module.f", "f", "", ".f"])
def test_a_module_that_is_not_there_is_refused_at_once(path):
    with pytest.raises(ValueError, match="cannot be imported"):
        PythonFunction(function=path)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="1 or more"):
        PythonFunction(function=BEHAVES, processes=0)
    with pytest.raises(ValueError, match="above 0 seconds"):
        PythonFunction(function=BEHAVES, seconds_each=0.0)
