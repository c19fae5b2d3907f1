"""Whether an answer thinks first, in one think block, and then says something."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ptl.rewards.answers import CLOSE, OPEN, opens_thought
from ptl.rewards.base import Completion, Outcome, Reward

_WORD = re.compile(r"\w")


class ThinkFormat(Reward):
    """1 where the answer is one think block and then text, else 0 (DeepSeek-R1, arXiv:2501.12948, section 2.2.2).

    ``<think>`` comes first and once, ``</think>`` once; between them and after them there is a word or a number:
    ``<think></think>`` is no thought, and a thought without an answer no answer. Where the template has opened the
    block, its ``<think>`` is the prompt's, and a second one is one too many.
    """

    seconds = None

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [float(thinks_first(completion)) for completion in completions]


def thinks_first(completion: Completion) -> bool:
    """Whether the form is right; the result is not looked at."""
    text = completion.text.lstrip()
    if not opens_thought(completion):
        if not text.startswith(OPEN):
            return False
        text = text[len(OPEN) :]
    if OPEN in text or text.count(CLOSE) != 1:
        return False
    thought, _, answer = text.partition(CLOSE)
    return bool(_WORD.search(thought) and _WORD.search(answer))
