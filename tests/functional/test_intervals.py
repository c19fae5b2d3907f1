"""Wilson's interval against its definition and known values."""

from __future__ import annotations

import math

import pytest

from ptl.functional.intervals import Z95, wilson


def test_known_values():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_its_ends_are_the_shares_that_a_score_test_would_not_refuse():
    for count, total in ((1, 7), (30, 40), (499, 1000)):
        for end in wilson(count, total):
            assert abs(count / total - end) / math.sqrt(end * (1 - end) / total) == pytest.approx(Z95)


def test_it_is_symmetric_and_within_the_possible():
    for total in (1, 3, 50):
        for count in range(total + 1):
            low, high = wilson(count, total)
            assert 0 <= low <= count / total <= high <= 1
            assert wilson(total - count, total) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("count", "total"), [(-1, 3), (4, 3), (0, -1)])
def test_a_count_out_of_its_range_is_refused(count, total):
    with pytest.raises(ValueError, match="0 <= count <= total"):
        wilson(count, total)
