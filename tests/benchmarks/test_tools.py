"""When the tools benchmark's goals are met."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.tools import GOALS, result_of
from ptl.synth.tool_report import measures


def report(right_tools: int, right: int, calls: int, ended: int) -> dict[str, Any]:
    asked = [
        {"tool": "search", "calls": ["search"] if i < right_tools else ["clock"], "right": i < right, "ended": True}
        for i in range(20)
    ]
    plain = [
        {"tool": None, "calls": ["clock"] if i < calls else [], "right": None, "ended": i < ended} for i in range(20)
    ]
    return measures(asked, asked, plain)


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        ((18, 14, 1, 19), []),
        ((17, 14, 1, 19), ["right_tool"]),
        ((20, 13, 0, 20), ["right"]),
        ((20, 20, 2, 20), ["calls_on_ordinary"]),
        ((20, 20, 0, 18), ["ended"]),
    ],
)
def test_goals_are_met_all_or_not(found, missed):
    result = result_of(report(0, 0, 0, 0), report(*found))
    assert [name for name, reached in result["reached"].items() if not reached] == missed
    assert result["goals_met"] == (not missed) and result["goals"] == GOALS
    json.dumps(result, allow_nan=False)
