"""Unit tests split in two: what goes inside, what stays, and how strictly answers are compared."""

import pytest

from ptl.rewards.sandbox import ConversionError, convert
from ptl.rewards.sandbox.expressions import same
from ptl.rewards.sandbox.results import CallResult

SPLIT = [  # test, what goes inside, answers that pass, answers that do not
    ("assert f(2) == 3", ["f(2)"], [3], [2]),
    ("assert f(2) == 3, 'message'", ["f(2)"], [3.0], [True]),
    ("assert 3 == f(2)", ["f(2)"], [3], [None]),
    ("assert f([1, 2], x='a') == (1, {'b': [2]})", ["f([1, 2], x='a')"], [(1, {"b": [2]})], [[1, {"b": [2]}]]),
    ("assert f(1) == True", ["f(1)"], [True], [1]),
    ("assert f(1) is None", ["f(1)"], [None], [0]),
    ("assert f(1)", ["bool(f(1))"], [True], [False]),
    ("assert not f(1)", ["bool(f(1))"], [False], [True]),
    ("assert f(1) != 3", ["f(1)"], [4], [3]),
    ("assert abs(f(1) - 2.5) < 1e-6", ["f(1)"], [2.5000001], [2.6]),
    ("import math\nassert math.isclose(f(1), 2.5, rel_tol=0.001)", ["f(1)"], [2.501], [3]),
    ("assert set(f(1)) == set([3, 4])", ["set(f(1))"], [{4, 3}], [{3}]),
    ("assert sorted(f(1)) == [3, 4]", ["sorted(f(1))"], [[3, 4]], [[4, 3]]),
    ("assert f(1)[0] == 3 and len(f(2)) > 1", ["f(1)", "f(2)"], [(3,), "ab"], [(4,), "ab"]),
    ("assert f(1) in (3, 4)", ["f(1)"], [4], [5]),
    ("assert f('a' * 3, 10**2) == 'b' * 2", ["f('a' * 3, 10 ** 2)"], ["bb"], ["b"]),
    ("xs = [1, 2]\ny = 3\nassert f(xs) == y", ["f([1, 2])"], [3], [4]),
    ("for i in range(2):\n    assert f(i) == i + 1", ["f(0)", "f(1)"], [1, 2], [1, 1]),
    ("for a in [(1, 2)]:\n    assert f(a[0]) == a[1]", ["f((1, 2)[0])"], [2], [1]),
    ("def check(candidate):\n    assert candidate(1) == 2\n    assert True\ncheck(f)", ["f(1)"], [2], [1]),
    ("METADATA = {'author': 'x'}\ndef check(g):\n    '''Text.'''\n    assert g(1) == -2", ["f(1)"], [-2], [2]),
    ("for a, (b) in [(1, 2)]:\n    assert f(a) == b", ["f(1)"], [2], [1]),
    ("out = f(1)\nassert out == 2\nassert out != 3", ["f(1)", "f(1)"], [2, 2], [2, 3]),
    ("assert f(f(1)) == 3", ["f(f(1))"], [3], [1]),
    ("assert sum(10, 15) == 6", ["sum(10, 15)"], [6], [25]),
    ("assert f(Node(1)) == 2", ["f(Node(1))"], [2], [1]),
    ("assert f('x') == float('inf')", ["f('x')"], [float("inf")], [float("nan")]),
]
WEAK = [
    "import random\nfor _ in range(3):\n    x = random.random()\n    assert f(x) == x",
    "from math import isclose\nassert isclose(f(1), 77.5)",
    "def same_set(a, b): return set(a) == set(b)\nassert same_set(f(1), [77])",
    "assert all(f(i) == 77 for i in range(3))",
    "x = [77]\nx.append(1)\nassert f(1) == x",
    "try:\n    f(77)\n    assert False\nexcept ValueError:\n    pass",
    "s = Stack()\ns.push(77)\nassert s.pop() == 77",
    "assert f(1).startswith('77')",
    "assert '%d' % f(1) == '77'",
    "assert compare(f(1), 77)\nassert f(2) == 78",
    "assert f(1) == g",
    "with open('77') as file:\n    assert f(file) == 77",
]


def passes(tests, answers):
    given = [CallResult(answer) for answer in answers]
    return all(check.holds(given[i : i + len(check.calls)]) for i, check in _placed(tests))


def _placed(tests):
    place = 0
    for check in tests.checks:
        yield place, check
        place += len(check.calls)


@pytest.mark.parametrize(("source", "calls", "right", "wrong"), SPLIT)
def test_an_assertion_is_split(source, calls, right, wrong):
    entry_point = None if "sum(" in source or "Node" in source or "check(f)" in source else "f"
    tests = convert(source, entry_point, "class Node: ..." if "Node" in source else "")
    assert list(tests.calls()) == calls and not tests.weak
    assert passes(tests, right)
    assert not passes(tests, wrong)


@pytest.mark.parametrize("source", WEAK)
def test_law_4_what_cannot_be_split_stays_out_unless_it_is_asked_for(source):
    tests = convert(source, "f" if "compare" not in source else None)
    assert tests.weak and tests.reason
    sent = "\n".join([tests.setup, *tests.calls()])
    assert "77" not in sent
    assert tests.calls(weak=True)[-1] == tests.weak


def test_law_4_no_expected_value_goes_inside():
    source = """
from math import isclose
METADATA = {"answer": "expected-0"}
def check(candidate):
    wanted = ["expected-1", 77.25]
    assert candidate("in-1") == wanted[0]
    assert candidate("in-2") == "expected-2" or candidate("in-3") == {"expected-3": 1}
    assert abs(candidate("in-4") - 77.5) < 1e-3
    assert isclose(candidate("in-5"), 77.125)
    assert candidate("in-6") in ("expected-4", "expected-5")
    for given, result in (("in-7", "expected-6"),):
        assert candidate(given) == result
"""
    tests = convert(source, "f")
    sent = "\n".join([tests.setup, *tests.calls()])
    assert "expected" not in sent and "77" not in sent
    assert [f"in-{i}" in sent for i in range(1, 8)] == [True, True, True, True, False, True, True]


def test_a_mixed_check_keeps_what_can_be_split():
    source = "def check(c):\n    assert c(1) == 2\n    x = input()\n    assert c(x) == 3\n    assert c(4) == 5"
    tests = convert(source, "f")
    assert tests.calls() == ("f(1)", "f(4)")
    assert tests.weak.endswith("check(f)") and "input" in tests.reason


def test_a_name_that_was_changed_by_what_was_not_followed_is_not_trusted():
    tests = convert("x = [1]\nf(x)\nassert f(x) == [2]", "f")
    assert tests.checks == () and tests.weak


@pytest.mark.parametrize("source", ["assert f(", "def check(c):\n    assert c(1) == 2"])
def test_tests_that_cannot_be_read_are_an_error(source):
    with pytest.raises(ConversionError):
        convert(source)


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        (1, 1.0, True), (True, 1, False), (False, 0, False), ([1], (1,), False), ([True], [1], False), ({1}, {1.0},
        True),
        ({True}, {1}, False), ({1: True}, {1: 1}, False), ({True: 1}, {1: 1}, False), (float("nan"), float("nan"),
        False),
        ("a", b"a", False), (None, False, False), (2**70, float(2**70), True), ({1: 2, 3: 4}, {3: 4, 1: 2}, True),
        (frozenset([1]), {1}, True), ([], (), False), ("", [], False), (0, "", False), (1 + 0j, 1, True), ([1, 2],
        [1], False),
    ],
)  # fmt: skip
def test_equality_is_strict(left, right, equal):
    assert same(left, right) is equal


HOSTILE = {
    "huge integer": 1 << 900000, "huge negative": -(1 << 900000), "text": "x" * 200000, "format": "%s" * 9,
    "nan": float("nan"), "lists": [[]] * 1000, "dict": {}, "none": None, "bytes": b"x", "large float": 1e308,
    "complex": 2j, "set": set(),
}  # fmt: skip


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_no_answer_makes_a_check_raise_or_stall(answer):
    for source in (
        "assert f(1) * 1000 == 5", "assert f(1) ** f(2) == 5", "assert abs(f(1) - 2.5) < 1", "assert f(1) / 3 == 5",
        "assert f(1) % 7 == 5", "assert round(f(1), 2) == 5", "assert f(1)[0] == 5", "assert len(f(1)) == 5",
        "assert str(f(1)) == '5'", "assert list(range(f(1))) == 5", "assert f(1) * f(2) == 5", "assert -f(1) == 5",
        "assert sum(f(1)) == 5", "assert float(f(1)) == 5", "assert int(f(1)) == 5",
        "assert f(1) in f(2) and f(3) == 5",
    ):  # fmt: skip
        (check,) = convert(source, "f").checks
        assert not check.holds([CallResult(answer)] * len(check.calls))
