"""The measures of a report, on answers whose numbers can be counted by hand, and its page and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptl.synth.idk_report import DECISIONS, MEASURES, markdown, measure, part_of, share, write_report


def answer(
    number: int, decision: str, *, right=False, refused=False, source="a", text="It | is <b>x</b>.\nYes."
) -> Any:
    sample = {"text": text, "right": right, "refused": refused}
    prompt = [{"role": "system", "content": "short"}, {"role": "user", "content": f"Question {number}?"}]
    row = {"number": number, "prompt": prompt, "answers": ["x", "y"], "source": source, "decision": decision}
    return row | {"samples": [sample], "model": "m@0"}


ROWS = [
    answer(0, "known", right=True),
    answer(1, "known", right=True, source="b"),
    answer(2, "known", refused=True),
    answer(3, "known"),
    answer(4, "unknown", refused=True),
    answer(5, "unknown", refused=True, source="b"),
    answer(6, "unknown"),
    answer(7, "between", right=True),
]


def counted(value: Any) -> tuple[int, int]:
    return value["count"], value["of"]


def test_the_measures():
    part = part_of(ROWS)
    assert part["questions"] == {"all": 8, "known": 4, "between": 1, "unknown": 3}
    assert counted(part["answered"]) == (5, 8)
    assert counted(part["right_when_answered"]) == (3, 5)
    assert counted(part["right_on_known"]) == (2, 4)
    assert counted(part["wrong_refusals"]) == (1, 4)
    assert counted(part["right_refusals"]) == (2, 3)
    assert set(MEASURES) <= set(part)


def test_a_share_has_its_interval_and_none_of_nothing():
    assert share(5, 10)["share"] == 0.5 and share(5, 10)["low"] == pytest.approx(0.2366, abs=1e-4)
    assert share(0, 0) == {"count": 0, "of": 0, "share": None, "low": 0.0, "high": 1.0}
    assert part_of([])["answered"]["share"] is None


def test_by_source_the_counts_add_up():
    report = measure({"before": ROWS, "after": ROWS[::1]})
    assert [model["name"] for model in report["models"]] == ["before", "after"]
    for model in report["models"]:
        assert sorted(model["by_source"]) == ["a", "b"]
        for name in MEASURES:
            parts = [counted(part[name]) for part in model["by_source"].values()]
            assert tuple(map(sum, zip(*parts))) == counted(model["all"][name])
        for decision in ("all", *DECISIONS):
            assert (
                sum(part["questions"][decision] for part in model["by_source"].values())
                == (model["all"]["questions"][decision])
            )


def test_models_that_were_asked_other_questions_are_not_compared():
    with pytest.raises(ValueError, match=r"after was asked .*\(7\) than before \(8\)"):
        measure({"before": ROWS, "after": ROWS[1:]})


def test_the_page_the_picture_and_the_numbers(tmp_path: Path):
    after = [answer(row["number"], row["decision"], refused=row["decision"] == "unknown") for row in ROWS]
    answers = {"base": ROWS, "run": [{**row, "source": other["source"]} for row, other in zip(after, ROWS)]}
    report = measure(answers)
    write_report(report, answers, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.md").read_text()
    assert page == markdown(report, answers)
    assert "8 questions: 4 known, 1 between, 3 unknown." in page
    assert "| base | 62.5% of 8 [30.6%, 86.3%] | 60.0% of 5" in page and "| run | 62.5% of 8" in page
    assert "## a" in page and "## b" in page
    assert "It \\| is &lt;b>x&lt;/b>. Yes." in page  # what a model wrote breaks no table and is no markup
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_without_known_or_without_unknown_questions_is_whole(tmp_path: Path):
    for decision in DECISIONS:
        rows = [row for row in ROWS if row["decision"] == decision]
        write_report(measure({"m": rows}), {"m": rows}, tmp_path)
        assert "–" in (tmp_path / "report.md").read_text()
