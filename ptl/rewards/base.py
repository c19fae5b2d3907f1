"""What a reward is: from answers to a number each, or no number, or a reason why there is none.

Nothing here imports torch, so that the processes that check answers start at once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ptl.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer that was sampled.

    Attributes:
        prompt: the question's record: messages, expected answer, tests, meta.
        prompt_text: the end of the text that the policy read, as the template printed it. It may end with a think
            block's opening, which then is no part of ``text``.
        text: what the policy wrote, special tokens included, without the token that ended it; of an answer that used
            tools, its last turn.
        ids: its token ids, with the one that ended it; with tools those of all turns and results.
        finished: it came to its end; False where it was cut at the limit.
        results: what its tools said, in order.
    """

    prompt: Prompt
    prompt_text: str = ""
    text: str
    ids: Sequence[int] = ()
    finished: bool = True
    results: Sequence[str] = ()


@dataclass(frozen=True)
class Failure:
    """Why an answer could not be judged. It counts as an error, and is never a reward of 0.

    Attributes:
        reason: one word of a few, to count by, such as ``timeout`` or ``raised``.
        detail: for a person to read.
    """

    reason: str
    detail: str = ""


Outcome = float | None | Failure
"""A reward; None where the reward does not apply to the answer; a ``Failure`` where it should have and could not."""


class Reward(ABC):
    """A judge of answers.

    Arguments:
        weight: factor of its values in the sum of rewards; 0 only logs them.
        name: that it is logged under; None takes the class's own.

    Attributes:
        seconds: most time that a batch may take; one that takes longer is left alone and its answers fail with
            ``timeout``. None waits: for rewards that bound their own time, or that must run in the caller's thread,
            such as a model.
        measured: names, behind its own and an underscore, of what ``take_measures`` may hold.

    Raises:
        ValueError: the weight is not a finite number.
    """

    seconds: ClassVar[float | None] = 300.0
    measured: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, weight: float = 1.0, name: str | None = None) -> None:
        if not abs(weight) < float("inf"):
            raise ValueError(f"a reward's weight must be a finite number, got {weight}")
        self.weight = weight
        self.name = name or _snake(type(self).__name__)

    @abstractmethod
    def score(self, completions: Sequence[Completion]) -> Sequence[Outcome]:
        """One outcome for each answer, in order. What it raises is counted as a failure of all of them."""

    def take_measures(self) -> dict[str, tuple[float, float]]:
        """What there is to log of the latest batch beside its outcomes, name -> (sum, weight); once."""
        return {}

    def close(self) -> None:  # noqa: B027  (most have nothing to end)
        """Ends what the reward has started; called once when the run ends."""


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
