"""The map over processes: order, bounded look-ahead, and failures that are told."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ptl.data.workers import MOST, WorkerError, in_order, outlive_signals, processes


def slow_square(number):
    time.sleep(0.02 * (number % 3))
    return number * number, os.getpid()


def fail(number):
    if number == 5:
        raise ValueError("row 5 is bad")
    if number == 7:
        raise KeyError("a defect")
    if number == 9:
        os._exit(9)
    return number


def thread_count(_):
    return threading.active_count()


def test_results_come_in_order_from_several_processes():
    results = list(in_order(slow_square, range(40), 3, inline=0))
    assert [square for square, _ in results] == [number * number for number in range(40)]
    assert len({pid for _, pid in results}) == 3 and os.getpid() not in {pid for _, pid in results}


@pytest.mark.parametrize(("tasks", "num_proc", "inline"), [(4, 8, 4), (50, 1, 0), (0, 4, 0)])
def test_few_tasks_or_one_process_start_none(tasks, num_proc, inline):
    results = list(in_order(slow_square, range(tasks), num_proc, inline))
    assert [square for square, _ in results] == [number * number for number in range(tasks)]
    assert {pid for _, pid in results} <= {os.getpid()}


def test_tasks_are_taken_only_as_results_are():
    taken = []

    def tasks():
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_order(slow_square, tasks(), 2, inline=0)
    for _ in range(3):
        next(results)
    assert len(taken) <= 3 + 3 * 2 + 1
    results.close()


@pytest.mark.parametrize(
    ("numbers", "error", "told"),
    [
        ([5], ValueError, "row 5"),
        ([7], WorkerError, "a defect"),
        ([9], WorkerError, "died"),
        ([9, 9, 9], WorkerError, "died"),
    ],
)
@pytest.mark.timeout(120)
def test_a_failure_in_a_process_is_raised_and_ends_all(numbers, error, told):
    with pytest.raises(error, match=told):
        list(in_order(fail, [1, 2, *numbers, *range(10, 30)], 2, inline=0))


def test_the_number_of_processes():
    assert processes(3) == 3 and 1 <= processes(None) <= MOST
    with pytest.raises(ValueError, match="num_proc"):
        processes(0)


ORPHANS = """
import os, sys, time
from ptl.data.workers import in_order
def work(number):
    time.sleep(0.05)
    return os.getpid()
results = in_order(work, iter(int, 1), 3, inline=0)
seen = set()
while len(seen) < 3:
    seen.add(next(results))
print(*seen, flush=True)
os.kill(os.getpid(), 9)
"""


def test_no_process_outlives_a_killed_parent():
    out = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in out.stdout.split()]
    assert out.returncode == -9 and len(pids) == 3
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < end, f"{pids} are still there"
        time.sleep(0.05)


def test_a_loaders_process_outlives_its_parents_signals_but_not_for_ever():
    def serve(ready) -> None:
        outlive_signals(seconds=1)
        ready.set()
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=serve, args=(ready,), daemon=True)
    process.start()
    try:
        assert ready.wait(20)
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, number)
        process.join(0.4)
        assert process.is_alive()
        process.join(20)
        assert process.exitcode == -signal.SIGALRM
    finally:
        process.kill()
