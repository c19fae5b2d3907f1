"""What stands out from the numbers before it."""

import pytest
import torch

from ptl.functional.spikes import spike_limit


def test_the_limit_is_the_median_and_robust_deviations():
    history = torch.tensor([1.0, 2.0, 3.0, 4.0, 1000.0, torch.nan, torch.inf])
    assert float(spike_limit(history, 10.0, 5)) == pytest.approx(3 + 10 * 1.4826)
    assert float(spike_limit(history, 10.0, 6)) == float("inf")
    assert float(spike_limit(torch.full((9,), 2.0), 10.0, 5)) == pytest.approx(2 + 10 * 0.05 * 2)
    assert float(spike_limit(torch.full((9,), torch.nan), 10.0, 1)) == float("inf")


def test_half_of_the_history_may_be_spikes_and_they_still_stand_out():
    history = torch.cat([torch.linspace(0.9, 1.1, 17), torch.full((15,), 500.0)])
    assert float(spike_limit(history, 10.0, 8)) < 10
