"""The scorers of reasoning-gym. Runs in the processes of ``GymScore``, which bound their time and memory.

Some scorers call ``eval``, or sympy's parser, which does, on the answer that a model wrote. What it may hold is told
here for each of them.
"""

from __future__ import annotations

import ast
import copy
import re
from functools import lru_cache
from typing import Any

import reasoning_gym  # noqa: F401  (takes seconds, which are no answer's time)

from ptl.data.gym import dataset_of
from ptl.rewards.gym import VERSION, Answer

LISTS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
"""Scorers that call ``eval`` on an answer which is not the expected text, to read a list."""
SUMS = ("countdown", "puzzle24")
"""Scorers that read an answer with sympy as arithmetic of numbers."""
FORMULAS = ("intermediate_integration", "simple_integration")
"""Scorers that read an answer with sympy as a formula."""
FOOLED = ("coin_flip", "complex_arithmetic", "game_of_life_halting")
"""Scorers that give 1 to a wrong answer: to ``0``, to ``nan``, to any."""
NAMES = re.compile(r"[A-Za-z]|a?(?:sin|cos|tan|sec|csc|cot)h?|exp|ln|log|pi|sqrt|Abs")
"""Names that a formula may hold. ``Integral`` is none: it would answer with the question."""


def check(job: Answer) -> float:
    """The score of an answer.

    An answer that the scorer cannot read and raises on is a wrong one, if it can read the expected answer.

    Raises:
        ValueError: no such data set, one whose scorer is fooled, or its question is another one; and what the scorer
            raises on the expected answer.
    """
    if job.dataset in FOOLED:
        raise ValueError(f"the scorer of {job.dataset} gives 1 to wrong answers; take ExactMatch or MathVerify")
    dataset, entry = dataset_of(job.dataset, job.config), _entry(job.dataset, job.config, job.index)
    if entry["question"] not in job.asked:
        raise ValueError(
            f"reasoning-gym {VERSION} makes another question of {job.dataset} at index {job.index}: the row was "
            "changed, or written with another version"
        )
    try:
        return float(dataset.score_answer(job.text if harmless(job.dataset, job.text) else None, copy.deepcopy(entry)))
    except Exception:
        dataset.score_answer(entry["answer"], copy.deepcopy(entry))
        return 0.0


@lru_cache(256)
def _entry(name: str, config: str, index: int) -> dict[str, Any]:
    return dataset_of(name, config)[index]


def harmless(dataset: str, text: str) -> bool:
    """Whether a data set may be given an answer: none that it would run as Python holds more than values."""
    if dataset in LISTS:
        return not any(mark in text for mark in "([{") or _is_literal(text)
    if dataset in SUMS:
        return re.fullmatch(r"[\d\s+*/().-]*", text, re.ASCII) is not None and "**" not in text
    if dataset in FORMULAS:
        plain = re.fullmatch(r"[\w\s+*/(),.-]*", text, re.ASCII) and not re.search(r"\.\s*[A-Za-z_]", text)
        return bool(plain) and all(map(NAMES.fullmatch, re.findall(r"[A-Za-z_]\w*", text)))
    return True


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True
