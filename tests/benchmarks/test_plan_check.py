"""The memory check: a real run of the real command against the plan."""

from __future__ import annotations

import pytest

from benchmarks.plan_check import CASES, GPU_CASES, Case, compared, measure, model_config, predict


def test_the_cases_vary_what_the_plan_depends_on():
    assert len(CASES) >= 8
    assert {"single", "ddp", "zero1", "zero2", "zero3", "zero2-offload"} <= {case.strategy for case in CASES}
    assert any(case.checkpointing for case in CASES) and any(case.adapter != "full" for case in CASES)
    assert len({case.sequence for case in CASES}) > 2 and len({case.micro_batch for case in CASES}) > 1
    for case in CASES:
        assert all(value > 0 for value in predict(case).values())


def test_a_line_says_both_errors():
    case = CASES[0]
    line = compared(case, int(sum(predict(case).values()) * 1.25))
    assert line["error"] == pytest.approx(-0.2, abs=1e-3) and line["net_error"] < line["error"]
    assert line["parameters"] > 20e6 and model_config(case)["hidden_size"] == case.hidden


def test_the_cases_of_a_gpu_are_planned_without_the_drivers_share():
    assert len(GPU_CASES) >= 8 and {"single", "zero2", "zero3"} <= {case.strategy for case in GPU_CASES}
    for case in GPU_CASES:
        parts = predict(case, "cuda")
        assert "driver and libraries" not in parts and "libraries" not in parts
        line = compared(case, int(sum(parts.values())), "cuda")
        assert abs(line["error"]) < 1e-6 and line["net_error"] == line["error"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_real_run_takes_what_is_planned():
    case = Case(name="quick", layers=10, vocab=8192, sequence=128)
    line = compared(case, measure(case, timeout=280))
    assert abs(line["error"]) < 0.15 and abs(line["net_error"]) < 0.25, line


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_of_zero_take_what_is_planned():
    case = Case(name="quick-zero2", strategy="zero2", ranks=2, layers=10, vocab=8192, sequence=128)
    line = compared(case, measure(case, timeout=880))
    assert abs(line["error"]) < 0.15, line
