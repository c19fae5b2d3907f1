"""What several answers to a held-out prompt say about a model: pass@k, the majority's answer, lengths."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How held-out prompts are answered and measured, apart from how answers are sampled for training.

    Attributes:
        samples: answers to each prompt, n.
        k: of pass@k and majority@k, each from 1 to n; n is added.
        temperature: of the sampling; 0 takes the likeliest token, with one answer alone.
        top_p: in (0, 1].
        max_new_tokens: most tokens of an answer; None takes the training's.
        solved_by: name of the reward that says whether an answer is right; None takes the one of the largest weight.
        threshold: least value of that reward of a right answer.
        seed: of the draws, the same at every evaluation.

    Raises:
        ValueError: a number out of its range, or answers that would all be the same.
    """

    samples: int = 4
    k: list[int] = field(default_factory=lambda: [1])
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int | None = None
    solved_by: str | None = None
    threshold: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"model.evaluation.samples must be 1 or more, got {self.samples}")
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise ValueError(f"model.evaluation.k must hold numbers from 1 to samples {self.samples}, got {self.k}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"model.evaluation.temperature must be 0 or above, got {self.temperature}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"model.evaluation.temperature 0 gives {self.samples} equal answers: set samples to 1, or a temperature"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"model.evaluation.top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"model.evaluation.max_new_tokens must be 1 or more, got {self.max_new_tokens}")

    @property
    def ks(self) -> tuple[int, ...]:
        """``k`` and n, ascending, each once."""
        return tuple(sorted({*self.k, self.samples}))

    @property
    def names(self) -> tuple[str, ...]:
        """What ``measures`` may return."""
        return tuple(f"{of}@{k}" for of in ("pass", "majority") for k in self.ks)


class Rated(NamedTuple):
    """How often one prompt was answered right.

    Attributes:
        row: of the prepared data.
        right: right answers.
        judged: answers of which that could be told.
    """

    row: int
    right: int
    judged: int

    @classmethod
    def of(cls, row: int, solved: Sequence[bool | None]) -> Rated:
        """From what ``measures`` is given."""
        judged = [right for right in solved if right is not None]
        return cls(row, sum(judged), len(judged))

    @property
    def rate(self) -> float | None:
        """The share of right answers, pass@1; None where none could be judged."""
        return self.right / self.judged if self.judged else None


def measures(
    solved: Sequence[bool | None], answers: Sequence[str | None], ks: Sequence[int]
) -> dict[str, tuple[float, float]]:
    """pass@k and majority@k of one prompt as (sum, weight); what cannot be told has no weight.

    Args:
        solved: of the n answers; None where it could not be judged, which leaves n smaller.
        answers: the final answer of each, in a form in which equal ones are equal; None where it gave none.
        ks: each from 1 to n.

    Returns:
        ``pass@k`` for every k up to the number of judged answers. ``majority@k`` of the first k answers, where any of
        them gave one.
    """
    judged = [bool(right) for right in solved if right is not None]
    found = {f"pass@{k}": (pass_at_k(len(judged), sum(judged), k), 1.0) for k in ks if k <= len(judged)}
    for k in ks:
        first = [(a, right) for a, right in zip(answers[:k], solved[:k]) if a is not None and right is not None]
        if first:
            # Counter keeps the order of first sight among equals.
            most = Counter(answer for answer, _ in first).most_common(1)[0][0]
            found[f"majority@{k}"] = (float(next(right for answer, right in first if answer == most) or 0), 1.0)
    return found


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that one of k answers out of n is right, ``1 - C(n - c, k) / C(n, k)`` (arXiv:2107.03374, 2.1).

    Args:
        n: answers.
        correct: right ones, c.
        k: from 1 to n.

    Raises:
        ValueError: k is not from 1 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs {k} answers or more, got {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
