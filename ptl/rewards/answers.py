"""Where an answer is in what a model wrote: behind the think block, in a box, after a mark."""

from __future__ import annotations

import re
from typing import NamedTuple

from ptl.rewards.base import Completion

OPEN, CLOSE = "<think>", "</think>"
LONGEST = 1000
"""Characters of an answer; no answer to a question is longer, and parsers are slow on what is."""
_TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_HASHES = re.compile(r"####[ \t]*")
_SAID = re.compile(r"\banswer\b[ \t*]*(?:\bis\b|:|=)[\s*:]*", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Found(NamedTuple):
    """A final answer.

    Attributes:
        text: of it, without white space around.
        mark: ``boxed``, ``tag``, ``hashes`` or ``said``, how it was marked; ``none`` where all that was said stands.
    """

    text: str
    mark: str


def opens_thought(completion: Completion) -> bool:
    """Whether the prompt ends inside a think block that the template opened."""
    return completion.prompt_text.rstrip().endswith(OPEN)


def said(completion: Completion) -> str | None:
    """What stands behind the think block, or everything where there is none; None in a block that was not closed."""
    _, closed, after = completion.text.rpartition(CLOSE)
    if closed:
        return None if OPEN in after else after.strip()
    return None if OPEN in completion.text or opens_thought(completion) else completion.text.strip()


def final_answer(completion: Completion) -> Found | None:
    r"""The answer that an answer ends in, or None where it says nothing.

    The last of: an ``<answer>`` block, and in it or without it a ``\boxed{}``, a line ``#### n``, ``answer is`` or
    ``answer:`` with the rest of its line; else all that was said. Only the last of several marks of a kind counts, so
    that naming many answers does not help.
    """
    text = said(completion)
    if not text:
        return None
    mark = "none"
    if blocks := _TAGGED.findall(text):
        text, mark = blocks[-1].strip(), "tag"
    if (box := last_box(text)) is not None:
        text, mark = box, "boxed"
    elif rest := _after_last(_HASHES, text):
        text, mark = rest, "hashes"
    elif rest := _after_last(_SAID, text):
        text, mark = rest, "said"
    text = text.strip().strip("*").strip()
    return Found(text, mark) if text else None


def _after_last(mark: re.Pattern[str], text: str) -> str:
    """The rest of the line after the last of a mark; blank where there is none."""
    ends = [match.end() for match in mark.finditer(text)]
    return text[ends[-1] :].partition("\n")[0].strip() if ends else ""


def last_box(text: str) -> str | None:
    r"""The contents of the last ``\boxed{}`` whose braces are balanced, or None."""
    for start in reversed([match.end() for match in _BOX.finditer(text)][-20:]):
        depth = 1
        for place in range(start, min(len(text), start + LONGEST + 1)):
            if text[place - 1] == "\\" and text[place - 2] != "\\":
                continue  # an escaped brace
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start:place].strip()
    return None
