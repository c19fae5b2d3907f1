"""A penalty on answers that come near the limit of their length."""

from __future__ import annotations

from collections.abc import Sequence

from ptl.rewards.base import Completion, Outcome, Reward


class LengthPenalty(Reward):
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13), from 0 to -1.

    0 up to ``longest - buffer`` tokens, then falling in a straight line to -1 at ``longest``, and -1 beyond. It tells
    an answer that it is too long before the limit cuts it.

    Arguments:
        longest: tokens, 1 or more: the limit of the sampling, or less.
        buffer: tokens over which the penalty grows, from 1 to ``longest``.
        weight: factor of the penalty, above 0 to punish.
        name: as in ``Reward``.

    Raises:
        ValueError: a number out of its range.
    """

    seconds = None

    def __init__(self, *, longest: int, buffer: int, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        if not 1 <= buffer <= longest:
            raise ValueError(f"buffer must be from 1 to longest, got buffer {buffer} and longest {longest}")
        self.longest, self.buffer = longest, buffer

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [overlong(len(completion.ids), self.longest, self.buffer) for completion in completions]


def overlong(length: int, longest: int, buffer: int) -> float:
    """The penalty of an answer of ``length`` tokens, in [-1, 0]."""
    return -min(max((length - (longest - buffer)) / buffer, 0.0), 1.0)
