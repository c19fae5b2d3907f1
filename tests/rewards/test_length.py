"""DAPO's soft overlong punishment."""

from __future__ import annotations

import pytest

from ptl.rewards.length import LengthPenalty
from tests.rewards.parts import completion


@pytest.mark.parametrize(
    "length, value", [(0, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (21, -1.0), (500, -1.0)]
)
def test_equation_13(length, value):
    """L_max 20 and L_cache 4: 0 up to 16, ((L_max - L_cache) - |y|) / L_cache up to 20, then -1."""
    assert LengthPenalty(longest=20, buffer=4).score([completion("x", ids=range(length))]) == [value]


@pytest.mark.parametrize("numbers", [{"longest": 4, "buffer": 5}, {"longest": 4, "buffer": 0}])
def test_numbers_out_of_range_are_refused(numbers):
    with pytest.raises(ValueError, match="buffer"):
        LengthPenalty(**numbers)
