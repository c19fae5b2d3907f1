"""The tools benchmark's data, and when its goals are met."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.tools import GOALS, documents, ordinary, result_of
from ptl.synth.tool_report import measures
from ptl.tools.index import index_of, search


def test_a_search_finds_the_answer_to_each_question(tmp_path):
    rows = [
        {"question": "who wrote the stranger ?", "answers": ["Camus"]},
        {"question": "how high is it", "answers": ["9"]},
    ]
    made = list(documents(rows))
    assert [row["text"] for row in made] == ["Who wrote the stranger? Camus.", "How high is it? 9."]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    assert "Camus" in search("Who wrote the stranger", str(index_of(path)))


def test_ordinary_questions_are_asked_once_and_ask_no_quiz():
    asked = [row["messages"][0]["content"] for row in ordinary()]
    assert len(asked) > 300 and len({text.lower() for text in asked}) == len(asked)
    assert not any("President of the United States" in text for text in asked)
    assert asked == [row["messages"][0]["content"] for row in ordinary()]


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
