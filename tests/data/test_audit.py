"""The audit: its equation, its quantiles, its thresholds, its forms."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from ptl.data.audit import EXAMPLES, Audit, AuditError, Reason, SourceAudit, Thresholds, length_summary
from ptl.data.duplicates import DIGEST, Seen


def source(**changes):
    base = SourceAudit(
        name="chats", path="chats.jsonl", format="messages", rows=100, kept=90, documents=95, tokens=9000,
        trained_tokens=4000, truncated=10, truncated_rows=8, lost_end=3, bos=[0, 94, 1], duplicates=4,
        refused={"broken_json": Reason(2, ["chats.jsonl:3: broken_json: x", "chats.jsonl:9: broken_json: y"])},
        dropped={"too_long": Reason(5, ["chats.jsonl:4: too_long: 9"]), "fully_masked": Reason(3, [])},
        lengths={"mean": 94.7, "p5": 10, "p50": 90, "p95": 200, "max": 300},
    )  # fmt: skip
    return replace(base, **changes)


OPEN = Thresholds(max_bad_fraction=1.0, max_fully_masked=1.0, max_truncated=1.0, min_trained_tokens=0)


@pytest.mark.parametrize(
    ("limit", "passes", "fails", "told"),
    [
        (
            "max_bad_fraction",
            0.02,
            0.019,
            ["data.thresholds.max_bad_fraction", "2 of 100", "chats.jsonl:3: broken_json"],
        ),
        ("max_fully_masked", 3 / 98, 0.03, ["data.thresholds.max_fully_masked", "3 of 98"]),
        ("max_truncated", 13 / 98, 0.13, ["data.thresholds.max_truncated", "13 of 98"]),
        ("min_trained_tokens", 4000, 4001, ["data.thresholds.min_trained_tokens", "4,000"]),
    ],
)
def test_a_threshold_stops_the_run_and_names_its_key(limit, passes, fails, told):
    Audit([source()]).check(replace(OPEN, **{limit: passes}))
    with pytest.raises(AuditError) as caught:
        Audit([source(rows=100, refused={}, name="fine"), source()]).check(replace(OPEN, **{limit: fails}))
    assert all(text in str(caught.value) for text in told)


def test_the_suggested_fraction_is_enough():
    entry = source(rows=30_001, refused={"broken_json": Reason(7, [])})
    with pytest.raises(AuditError) as caught:
        entry.check(Thresholds())
    share = float(str(caught.value).rstrip(".").rsplit(" ", 1)[1])
    entry.check(Thresholds(max_bad_fraction=share))


def test_a_small_bad_source_does_not_hide_in_a_large_good_one():
    big = source(rows=10**6, refused={})
    with pytest.raises(AuditError, match="chats"):
        Audit([big, source(rows=2, refused={"broken_json": Reason(2, [])})]).check(Thresholds(max_bad_fraction=0.1))


def test_a_source_without_rows_is_refused():
    with pytest.raises(AuditError, match="no rows"):
        source(rows=0).check(OPEN)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(value):
    with pytest.raises(ValueError, match="max_truncated"):
        Thresholds(max_truncated=value)


def test_json_and_back():
    audit = Audit([source(), source(name="two", bos=None)])
    text = json.dumps(audit.as_dict())
    assert Audit.from_dict(json.loads(text)) == audit


def test_the_table_shows_every_number():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(Audit([source(), source(name="other", dropped={}, refused={"unknown_role": Reason(1, [])})]).table())
    text = console.export_text()
    for shown in ("chats", "other", "broken_json", "unknown_role", "2 (2.0%)", "4,000 (44.4%)", "0/94/1", "90/200/300"):
        assert shown in text


def test_examples_are_few_and_name_the_source():
    reason = Reason()
    for number in range(20):
        reason.add(1, [f"f:{number}: x"])
    assert reason.count == 20 and reason.examples == [f"f:{number}: x" for number in range(EXAMPLES)]
    assert Audit([source(refused={"x": reason}, dropped={})]).examples()[0] == "chats: f:0: x"


def test_quantiles_are_those_of_the_list():
    lengths = np.random.default_rng(0).integers(1, 500, 999)
    summary = length_summary(np.bincount(lengths))
    for name, share in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert summary[name] == np.quantile(lengths, share, method="inverted_cdf")
    assert summary["max"] == lengths.max() and summary["mean"] == pytest.approx(lengths.mean(), abs=0.01)
    assert length_summary(np.zeros(4, np.int64)) == {}


def test_seen_agrees_with_a_set():
    random = np.random.default_rng(1)
    seen, known = Seen(), set()
    for size in random.integers(1, 400, 200):
        values = [int(value).to_bytes(16, "big") for value in random.integers(0, 20_000, size)]
        expected = []
        for value in values:
            expected.append(value in known)
            known.add(value)
        assert seen.add(np.array(values, DIGEST)).tolist() == expected
    assert sum(len(run) for run in seen.runs) == len(known) and len(seen.runs) <= 16


def test_seen_tells_digests_apart_that_end_in_zero_bytes():
    digests = np.array([b"a" * 15 + b"\0", b"a" * 14 + b"\0\0", b"\0" * 16, b"\0" * 15 + b"a"], DIGEST)
    assert not Seen().add(digests).any()
