"""Equality as mathematics, by math-verify. Runs in the processes of ``MathVerify``, which bound its time and memory."""

from __future__ import annotations

import logging

from math_verify import parse, verify

from ptl.rewards.maths import Check

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)


def check(job: Check) -> bool:
    """Whether the answer equals what was expected.

    Raises:
        ValueError: the expected answer is no mathematics; and what sympy raises on the way.
    """
    wanted = _whole(job.expected)
    if not wanted:
        raise ValueError(
            f"math-verify cannot read the expected answer {job.expected[:200]!r}; ExactMatch compares text"
        )
    text, mark = job.answer
    # In a box it is all one expression. Behind another mark it may be one, or have words around it ("72 clips").
    given = ([] if mark == "none" else _whole(text.removesuffix("."))) + ([] if mark == "boxed" else _within(text))
    return bool(given) and bool(verify(wanted, given, timeout_seconds=None, raise_on_error=True))


def _whole(text: str) -> list:
    """The expression that a text is."""
    return _within(f"\\boxed{{{text}}}")


def _within(text: str) -> list:
    """The last expression in a text: LaTeX, or a number."""
    # The caller has the clock: the library's own alarm is not heard while sympy works.
    return parse(text, parsing_timeout=0, raise_on_error=True, fallback_mode="no_fallback")


_whole("\\frac{1}{2}")  # the grammar and the patterns are built on first use, which is no answer's time
