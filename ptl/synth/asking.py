"""Questions shared by several processes, each answered once: a part each, one file in the order of the questions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ptl.data.render import RenderError
from ptl.data.sources import BadRow
from ptl.synth.lines import settle
from ptl.synth.questions import Question, batches
from ptl.synth.shares import Done, Shares
from ptl.types import Origin

Todo = Sequence[tuple[Question, int]]
"""Questions of one batch, each with the most ids that its answer may have; 0 or less is no room."""
Outcome = tuple[dict[str, Any] | None, dict[str, Any]]
"""The row of a question, or None, and what became of it: ``number``, ``key``, ``reason``, ``origin``, and more."""


class Settings(Protocol):
    """A dataclass of what answers depend on; ``batch_tokens`` moves the last bits of their numbers and no more."""

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def batch_tokens(self) -> int: ...


def check_least(settings: Any, **least: int) -> None:
    """Raises ValueError, with the option's name, for a number below its least value."""
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} must be {value} or more, got {getattr(settings, name)}")


class LeftOut:
    """Counts rows that have no question; an instance is what ``questions`` calls for each.

    Attributes:
        counts: reason -> rows.
        first: reason -> file and line of the first of them.
        why: the first of all, with its reason in words; ``-`` where there is none.
    """

    def __init__(self) -> None:
        self.counts, self.first, self.why = Counter[str](), dict[str, str](), "-"

    def __call__(self, error: BadRow | RenderError, origin: Origin) -> None:
        self.add(error.reason, str(origin))
        if self.why == "-":
            self.why = f"{origin}: {error}"

    def add(self, reason: str, origin: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, origin)

    def told(self) -> str:
        """Each reason with its rows and the first of them, for people; empty where nothing was left out."""
        return ", ".join(f"{n:,} {reason} (first {self.first[reason]})" for reason, n in sorted(self.counts.items()))


class Answered(NamedTuple):
    """What came of the questions.

    Attributes:
        questions: how many there are.
        items: what became of each, in order; None where other processes have not done their share yet.
    """

    questions: int
    items: list[Done] | None


def answer_all(
    asked: Iterable[Question],
    answer: Callable[[Todo, Mapping[int, str]], Iterator[Outcome]],
    path: Path,
    settings: Settings,
    left_out: LeftOut,
    *,
    room: int,
    samples: int,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[int], None] = lambda questions: None,
) -> Answered:
    """Writes a row for each question to ``path``, with all processes that are given the same arguments.

    Each process appends whole batches to a part beside ``path``; the one that finds all done joins them in the order
    of the questions. A call that was killed is repeated to go on. Which questions share a batch depends on the data and
    ``batch_tokens`` alone, so that even the rounding of numbers is that of a run which was not killed.

    Args:
        asked: the questions.
        answer: the outcome of each question of a batch, given also the key of each by its number.
        path: a .jsonl file.
        settings: what answers depend on, a dataclass.
        left_out: told of the rows that have no question; of those that have no answer it is told here.
        room: positions that the model was made for.
        samples: answers to a question.
        rank, world_size: of this process.
        report: called with the number of questions done after each batch.

    Raises:
        ValueError: the file was begun with other settings or questions, or there is no question.
    """
    settle(path, settings)
    shares = Shares(path, rank)
    known, numbers = shares.done(), []
    sizes = {"max_new_tokens": settings.max_new_tokens, "batch_tokens": settings.batch_tokens, "answers": samples}
    for index, batch in enumerate(batches(asked, room=room, **sizes)):
        keys = {question.number: _key(question, settings) for question, _ in batch}
        numbers += keys
        for question, _ in batch:
            if question.number in known and known[question.number].entry["key"] != keys[question.number]:
                raise ValueError(
                    f"{question.origin}: {path} was begun with other prompts: give another file, or delete {path}*"
                )
        todo = [(question, limit) for question, limit in batch if question.number not in known]
        if todo and index % world_size == rank:
            results = list(answer(todo, keys))
            shares.append([row for row, _ in results if row is not None], [entry for _, entry in results])
            report(len(todo))
    if not numbers:
        raise ValueError(f"no row has a prompt ({left_out.counts.total():,} are left out, the first: {left_out.why})")
    items = shares.join(sorted(numbers))
    for done in items or ():
        if done.entry["reason"] is not None:
            left_out.add(done.entry["reason"], done.entry["origin"])
    return Answered(len(numbers), items)


def _key(question: Question, settings: Any) -> str:
    """Names a question and how it is answered; what ``batch_tokens`` is does not matter."""
    numbers = {**asdict(settings), "batch_tokens": None}
    known = [dict(question.known)] if question.known else []
    text = json.dumps([numbers, question.number, question.ids, *known], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
