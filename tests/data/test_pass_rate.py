"""Rows picked by how often a model solved them: kept, left out and counted, or refused."""

import json

import pytest

from ptl.data.prepare import prepare
from ptl.data.prompts import PromptView
from ptl.data.records import parse_row
from ptl.data.render import Renderer
from ptl.data.sources import BadRow, LeftOut, Source
from ptl.data.views import ChatView
from ptl.types import Origin


def read(row, source):
    return parse_row(row, "prompt", source, Origin("rows.jsonl", 1))


RATES = (0.0, 0.125, 0.5, 0.875, 1.0)


def rated(rate, **more):
    return {"question": f"{rate}?", "answer": "1", "pass_rate": rate, **more}


def test_a_pass_rate_within_the_bounds_stays():
    source = Source(path="rows.jsonl", pass_rate=[0.125, 0.875])
    for rate in RATES:
        if 0.125 <= rate <= 0.875:
            assert read(rated(rate), source).meta["pass_rate"] == rate
        else:
            with pytest.raises(LeftOut, match=f"pass_rate is {rate:g}, outside of 0.125 to 0.875") as caught:
                read(rated(rate), source)
            assert caught.value.reason == "pass_rate"
    assert read(rated("0.5"), source).answer == "1"  # as a CSV gives it


@pytest.mark.parametrize(
    ("value", "reason"), [(None, "wrong_type"), (True, "wrong_type"), ("half", "wrong_type"), (1.5, "wrong_type")]
)
def test_a_pass_rate_that_is_none_is_refused(value, reason):
    source = Source(path="rows.jsonl", pass_rate=[0.0, 1.0])
    with pytest.raises(BadRow) as caught:
        read(rated(value), source)
    assert caught.value.reason == reason and not isinstance(caught.value, LeftOut)
    with pytest.raises(BadRow, match=r"no pass_rate \(column 'solved'\)"):
        read(
            {"question": "q", "answer": "1"},
            Source(path="rows.jsonl", pass_rate=[0.0, 1.0], columns={"pass_rate": "solved"}),
        )
    read(rated(value), Source(path="rows.jsonl"))  # nobody asked


@pytest.mark.parametrize("bounds", [[], [0.5], [0.5, 0.4], [-0.1, 1.0], [0.0, 1.1], [0, 0.5, 1], [float("nan"), 1.0]])
def test_bounds_that_are_none_are_refused(bounds):
    with pytest.raises(ValueError, match=r"expected \[low, high\]"):
        Source(path="x", pass_rate=bounds)


@pytest.mark.parametrize("view", [PromptView(room=8), ChatView()])
def test_law_8_rows_outside_of_the_pass_rate_are_counted(tmp_path, tokenizer, view):
    path = tmp_path / "rated.jsonl"
    said = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = [rated(rate) if isinstance(view, PromptView) else {**said, "pass_rate": rate} for rate in RATES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(bounds):
        source = Source(path=str(path), pass_rate=bounds)
        how = {"max_length": 64, "truncation": "error", "cache_dir": tmp_path / "cache", "num_proc": 1, "quiet": True}
        return prepare([source], view=view, renderer=Renderer(tokenizer), **how)

    some, all_ = run([0.1, 0.9]), run(None)
    (entry,) = some.audit.sources
    assert (entry.rows, entry.kept, entry.refused_rows, entry.dropped_by("pass_rate")) == (5, 3, 0, 2)
    assert entry.rendered_rows == 3 and some.rows["line"][:] == [2, 3, 4]
    assert entry.dropped["pass_rate"].examples[0] == f"{path}:1: pass_rate: pass_rate is 0, outside of 0.1 to 0.9"
    assert "dropped: pass_rate" in some.audit._lines() and all_.audit.sources[0].kept == 5
    assert run([0.1, 0.9]).path == some.path != all_.path
