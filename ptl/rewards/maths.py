"""Whether a final answer is the expected one: as text, as a number, or as mathematics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from typing import NamedTuple

from ptl.rewards.answers import LONGEST, Found, final_answer, last_box
from ptl.rewards.base import Completion, Failure, Outcome, Reward
from ptl.rewards.workers import Workers

MEMORY = 4 << 30
"""Bytes of address space of a process that checks: an expression can ask for all there is."""
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER = re.compile(rf"([+-]?)({_DIGITS})(?:/([1-9]\d*))?(%?)", re.ASCII)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_SPACES = re.compile(r"\\[,;:! ]|\s+")


class ExactMatch(Reward):
    """1 where the final answer is the expected text, else 0; None where the prompt has no answer.

    Case, white space and a full stop at the end do not matter. Where an answer is, ``final_answer`` tells.
    """

    seconds = None

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [_exact(completion) for completion in completions]


def _exact(completion: Completion) -> float | None:
    if completion.prompt.answer is None:
        return None
    found = final_answer(completion)
    return float(found is not None and plain(found.text) == plain(expected(completion.prompt.answer)))


class MathVerify(Reward):
    r"""1 where the final answer equals the expected one as mathematics, else 0; None where the prompt has no answer.

    Text that is equal is right, and so are numbers that are (72, 72.0, 1,000, 3/4, \frac{3}{4}, $5, 50% for 0.5 or 50):
    these cost nothing. All else goes to math-verify, in processes that are killed after ``seconds_each``, because sympy
    may take forever. An answer that could not be checked is a failure with a reason (``timeout``, ``died``,
    ``raised``), not a wrong one; an expected answer that math-verify cannot read is one too.

    Arguments:
        seconds_each: time that an answer may take, above 0.
        processes: that share the work, 1 or more.
        weight, name: as in ``Reward``.

    Raises:
        ValueError: math-verify is not installed, or an argument is out of its range.
    """

    seconds = None

    def __init__(
        self, *, seconds_each: float = 5.0, processes: int = 1, weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight=weight, name=name)
        if find_spec("math_verify") is None:
            raise ValueError("MathVerify needs math-verify: pip install 'ptl[maths]', or take ExactMatch")
        self._workers = Workers("ptl.rewards.math_check.check", count=processes, seconds=seconds_each, memory=MEMORY)

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        hard: dict[int, Check] = {}
        for i, completion in enumerate(completions):
            easy = judged_at_once(completion)
            if isinstance(easy, Check):
                hard[i] = easy
            outcomes.append(None if isinstance(easy, Check) else easy)
        # The same answer to the same question is checked once: samples of a group agree often.
        distinct = list(dict.fromkeys(hard.values()))
        verdicts = dict(zip(distinct, self._workers.run(distinct)))
        for i, check in hard.items():
            outcomes[i] = verdicts[check]
        return outcomes

    def close(self) -> None:
        self._workers.close()


class Check(NamedTuple):
    """What has to be compared as mathematics.

    Attributes:
        answer: what was found, and how it was marked.
        expected: what it should equal.
    """

    answer: Found
    expected: str


def judged_at_once(completion: Completion) -> float | Failure | Check | None:
    """The outcome where text or numbers decide it, else what has to be compared."""
    if completion.prompt.answer is None:
        return None
    wanted = expected(completion.prompt.answer)
    if not wanted:
        return Failure("bad_answer", "the expected answer is blank")
    found = final_answer(completion)
    if found is None:
        return 0.0
    if found.mark == "none":
        found = Found(found.text[-LONGEST:], "none")
    if len(found.text) > LONGEST:
        return 0.0
    if plain(found.text) == plain(wanted):
        return 1.0
    number, wanted_number = number_of(found.text), number_of(wanted)
    if number is not None and wanted_number is not None:
        return float(equal(number, wanted_number))
    return Check(found, wanted)


def expected(answer: str) -> str:
    r"""The expected answer itself: what stands after GSM8K's ``####`` or in the last ``\boxed{}``, if there is one."""
    box = last_box(answer)
    return (box if box is not None else answer.rpartition("####")[2]).strip()


def plain(text: str) -> str:
    """A text without what does not matter to whether it is the same."""
    return " ".join(text.split()).removesuffix(".").strip().casefold()


def number_of(text: str) -> tuple[Fraction, bool] | None:
    """A number that is written out, and whether it is a percentage; None for all else.

    Signs, decimals, thousands with commas, fractions, currency signs and LaTeX for these are read. "3,5" is not: it may
    be a decimal or a pair.
    """
    if len(text) > 100:
        return None
    text = text.replace("−", "-").replace("\\%", "%").replace("{,}", ",").replace("\\$", "")
    for mark in ("\\(", "\\)", "\\[", "\\]", "$", "€", "£"):
        text = text.replace(mark, "")
    text = _SPACES.sub(" ", text).strip().removesuffix(".").strip()
    fraction = _FRACTION.sub(lambda m: f" {m[1].strip()}/{m[2].strip()} ", text).strip()
    # Two numbers side by side are no number: only spaces around a sign, a slash or a per cent go.
    match = _NUMBER.fullmatch(re.sub(r" ?([-+/%]) ?", r"\1", fraction))
    if not match or not match[2]:
        return None
    value = Fraction(match[2].replace(",", "")) / int(match[3] or 1)
    return (-value if match[1] == "-" else value), bool(match[4])


def equal(one: tuple[Fraction, bool], other: tuple[Fraction, bool]) -> bool:
    """Whether two numbers are the same, to six decimals where one is no integer; 50% is 0.5, and is 50."""
    (a, a_percent), (b, b_percent) = one, other
    if a_percent != b_percent:
        share, number = (a, b) if a_percent else (b, a)
        return _same(share, number) or _same(share / 100, number)
    return _same(a, b)


def _same(a: Fraction, b: Fraction) -> bool:
    return round(a, 6) == round(b, 6)
