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
    wanted = _read(job.expected, "boxed")
    if not wanted:
        raise ValueError(
            f"math-verify cannot read the expected answer {job.expected[:200]!r}; ExactMatch compares text"
        )
    given = _read(job.answer.text, job.answer.mark)
    return bool(given) and bool(verify(wanted, given, timeout_seconds=None, raise_on_error=True))


def _read(text: str, mark: str) -> list:
    r"""The expressions in a text. In a box it is all one expression; else mathematics or a number is looked for."""
    if mark == "boxed":
        text = f"\\boxed{{{text}}}"
    elif mark != "none" and "\\" in text and not any(sign in text for sign in ("$", "\\(", "\\[")):
        text = f"${text}$"
    # The caller has the clock: the library's own alarm is not heard while sympy works.
    return parse(text, parsing_timeout=None, raise_on_error=True, fallback_mode="no_fallback")


_read("\\frac{1}{2}", "boxed")  # the grammar and the patterns are built on first use, which is no answer's time
