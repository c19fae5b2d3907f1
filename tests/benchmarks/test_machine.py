"""What a measured process says of its machine."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.peer_tools import machine


def test_the_clock_measures_each_step_and_refuses_to_stop_before_it_started():
    clock = machine.StepClock("cpu")
    with pytest.raises(RuntimeError, match="not started"):
        clock.mark()
    clock.start()
    for wait in (0.0, 0.05):
        time.sleep(wait)
        clock.mark()
    assert clock.seconds[1] >= 0.05
    assert clock.cpu_seconds[1] < 0.05  # sleeping is not working


def test_the_peak_counts_what_was_held_and_given_back():
    before = machine.peak_memory("cpu")
    size = 2 * before
    held = torch.ones(size, dtype=torch.uint8)
    del held
    assert machine.peak_memory("cpu") >= size


def test_the_rate_of_a_matrix_product_is_a_number_of_operations_a_second():
    rate = machine.matmul_rate("cpu", torch.float32, size=128, seconds=0.01)
    assert 1e6 < rate < 1e15


def test_the_rate_of_a_type_in_which_a_product_takes_too_long_is_measured_on_smaller_ones():
    start = time.perf_counter()
    rate = machine.matmul_rate("cpu", torch.float32, size=1 << 14, seconds=0.01)  # 8.8e12 operations: a minute
    assert time.perf_counter() - start < 5
    assert rate > 1e6
