"""The memory benchmark measures what it says."""

from __future__ import annotations

import pytest

from benchmarks.memory import Case, compare


@pytest.mark.slow
def test_the_plain_side_is_the_leanest_and_a_small_head_needs_a_quarter_of_it():
    case = Case(vocab=151_936, hidden=64, dtype="fp32", adapter="full", device="cpu", tokens=320)
    line = compare(case, runs=1, timeout=120)
    logits = case.vocab * case.tokens * 4 / 2**20
    # Log-probabilities and two gradients of their size: the logits themselves are gone by the backward.
    assert line["peer_peak_mib"] == pytest.approx(3 * logits, rel=0.1)
    assert line["memory_ratio"] == pytest.approx(line["peak_mib"] / line["peer_peak_mib"], rel=1e-3)
    assert line["memory_ratio"] <= 0.25
    assert {"stage", "variant", "peer", "ratio", "pairs"} <= line.keys()
