"""Kendall's tau-b against published values and another way to compute it, and the report of a page."""

import itertools
import math

import numpy as np
import pytest

from ptl.apps.ranking.agreement import Agreement, kendall_tau_b
from ptl.apps.ranking.store import Verdict


def by_signs(first, second):
    """tau-b as the cosine of the two matrices of signs of differences."""
    a, b = (np.sign(np.subtract.outer(x, x)) for x in (np.asarray(first, float), np.asarray(second, float)))
    size = math.sqrt((a * a).sum() * (b * b).sum())
    return None if size == 0 else float((a * b).sum() / size)


def test_tau_b_equals_the_cosine_of_sign_matrices_on_every_order_of_four():
    orders = list(itertools.product((1, 2, 3, 4), repeat=4))
    for second in orders[::7]:
        for first in orders[::3]:
            expected = by_signs(first, second)
            got = kendall_tau_b(first, second)
            assert (got is None) == (expected is None)
            assert got is None or got == pytest.approx(expected, abs=1e-12)


def test_tau_b_of_published_data():
    # The example of scipy.stats.kendalltau.
    assert kendall_tau_b([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]) == pytest.approx(-0.47140452079103173, abs=1e-15)


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, None, 3], [2, 3, 1, None], 1.0),  # only the two that both ranked
        ([1, 1, 1], [1, 2, 3], None),  # one sees no difference
        ([1, None, 2], [None, 1, 2], None),  # one answer in common
    ],
)
def test_tau_b_where_answers_are_missing_or_tie(first, second, tau):
    assert kendall_tau_b(first, second) == tau


def said(name, prompt, ranks, *, status="ranked", seconds=10.0, revision=1):
    return Verdict(
        annotator=name,
        id=prompt,
        status=status,
        ranks=tuple(ranks),
        order=tuple(range(len(ranks))),
        seconds=seconds,
        revision=revision,
    )


def table(*verdicts):
    out = {}
    for verdict in verdicts:
        out.setdefault(verdict.id, {})[verdict.annotator] = verdict
    return out


def test_the_report_counts_pairs_prompts_and_each_annotator():
    report = Agreement().report(
        table(
            said("ada", "p", [1, 2, 3], seconds=10),
            said("bo", "p", [1, 2, 3], seconds=30),
            said("cy", "p", [3, 2, 1]),
            said("ada", "q", [1, 2, 3], seconds=20),
            said("bo", "q", [None] * 3, status="skipped", seconds=2),
            said("cy", "q", [1, 2, 3], status="flagged"),
        )
    )
    assert (report["tau"], report["pairs"], report["prompts"]) == (pytest.approx(-1 / 3), 3, 1)
    ada, bo, cy = report["annotators"]
    assert (ada["name"], ada["ranked"], ada["skipped"], ada["flagged"]) == ("ada", 2, 0, 0)
    assert (ada["seconds"], ada["tau"], bo["tau"], cy["tau"]) == (15, 0, 0, -1)
    assert (bo["skipped"], cy["flagged"]) == (1, 1)


def test_a_new_revision_changes_the_report():
    agreement = Agreement()
    first = [said("ada", "p", [1, 2]), said("bo", "p", [1, 2])]
    assert agreement.report(table(*first))["tau"] == 1
    assert agreement.report(table(first[0], said("bo", "p", [2, 1], revision=2)))["tau"] == -1


def test_a_report_of_nothing_has_no_agreement():
    assert Agreement().report({"p": {}}) == {"annotators": [], "tau": None, "pairs": 0, "prompts": 0}
