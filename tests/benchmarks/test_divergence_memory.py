"""The memory benchmark of the divergence: both sides are the same loss, and what it reports is what was held."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from benchmarks import divergence_memory
from benchmarks.divergence_memory import Case, compare, line_through, naive_loss
from ptl.functional.divergence import Divergence, Kind
from ptl.functional.fused_divergence import Side, fused_divergence


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_naive_side_is_the_same_loss(kind):
    torch.manual_seed(0)
    sides = [(torch.randn(7, h, dtype=torch.float64), torch.randn(50, h, dtype=torch.float64) / h**0.5) for h in (6, 9)]
    hidden, weight = (tensor.requires_grad_() for tensor in sides[0])
    plain = naive_loss(hidden @ weight.T, sides[1][0] @ sides[1][1].T, kind)
    expected = torch.autograd.grad(plain, (hidden, weight))
    targets, ones = torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.float64)
    fused = fused_divergence(Side(hidden, weight), Side(*sides[1]), targets, ones, divergence=Divergence(kind=kind))
    assert fused.total.item() == pytest.approx(plain.item(), rel=1e-9)
    for ours, theirs in zip(torch.autograd.grad(fused.total, (hidden, weight)), expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_measurement_is_read_off_the_line_through_two():
    runs = [{"peak_mib": 100.0, "seconds": 1.0}, {"peak_mib": 180.0, "seconds": 2.0}]
    assert line_through([10, 20], runs, 80) == {"peak_mib": 660.0, "seconds": 8.0}


@pytest.mark.slow
@pytest.mark.parametrize(("free", "measured"), [(1 << 60, [1024]), (0, [128, 256])])
def test_the_naive_side_holds_five_tensors_of_logits_measured_or_on_the_line(monkeypatch, free, measured):
    monkeypatch.setattr(divergence_memory, "free_bytes", lambda device: free)
    case = Case(tokens=1024, vocab=100_000, hidden=8, teacher_hidden=12)
    line = compare(case, timeout=120)
    assert line["naive_tokens"] == measured
    assert line["peer_peak_mib"] == pytest.approx(5 * case.tokens * case.vocab * 4 / 2**20, rel=0.1)
    assert line["memory_ratio"] == pytest.approx(line["peak_mib"] / line["peer_peak_mib"], rel=1e-3)
    assert line["memory_ratio"] <= 0.25
    assert {"stage", "variant", "peer", "ratio", "pairs"} <= line.keys()


def test_free_memory_is_a_number_of_bytes_of_this_machine():
    assert 1 << 24 < divergence_memory.free_bytes("cpu") < 1 << 50
