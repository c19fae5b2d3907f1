"""From graded questions to rows to learn from: the model's own right answers, refusals, and some general data."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ptl.data.files import resolve
from ptl.data.readers import first_rows, rows_of
from ptl.data.records import parse_row
from ptl.data.sources import BadRow, Source, check_record, detect_format
from ptl.synth.asking import LeftOut
from ptl.synth.idk import key_of
from ptl.synth.idk_texts import Language, hedge, language_of, place_of, refusal
from ptl.synth.questions import message_row
from ptl.types import Conversation, Message

Row = dict[str, Any]
Decision = Literal["known", "between", "unknown"]
SLACK = 1e-9
"""A share of right answers is compared with a bound up to this, for 2 of 3 is not 0.6667."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which rows are made of graded questions.

    Attributes:
        known: least share of right answers of a question that is answered, above ``unknown``, at most 1.
        unknown: most share of right answers of a question that is refused, 0 or more.
        between: what becomes of the others: no row, or an answer in words that say it may be wrong.
        max_refusals: most share of refusals among the rows made of questions, in [0, 1].
        held_out: share of the questions that are kept for the report, in [0, 1).
        language: of refusals and hedges; ``auto`` tells each question's own.
        mix_share: share of general rows in the file, in [0, 1).

    Raises:
        ValueError: a number out of its range.
    """

    known: float = 1.0
    unknown: float = 0.0
    between: Literal["drop", "hedge"] = "drop"
    max_refusals: float = 0.5
    held_out: float = 0.2
    language: Literal["auto", "en", "fr"] = "auto"
    mix_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.unknown < self.known <= 1:
            raise ValueError(
                f"--unknown {self.unknown:g} must be 0 or more and below --known {self.known:g}, which is at most 1"
            )
        if not 0 <= self.max_refusals <= 1:
            raise ValueError(f"--max-refusals must be from 0 to 1, got {self.max_refusals:g}")
        for name in ("held_out", "mix_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be 0 or more and below 1, got {getattr(self, name):g}"
                )


class Made(NamedTuple):
    """Rows, and what became of the questions.

    Attributes:
        train: rows to learn from, in the order of the questions.
        held_out: graded questions with their ``decision``.
        counts: source -> what became of a question (``known``, ``between`` or ``unknown``, of these ``held_out``, and
            of the others ``answer``, ``hedge``, ``refusal``, ``dropped``, ``capped`` and ``no_finished_answer``) ->
            questions.
    """

    train: list[Row]
    held_out: list[Row]
    counts: dict[str, Counter[str]]


def decide(k: int, n: int, choice: Choice) -> Decision:
    """Whether the model knows an answer that was right k times of n."""
    if k >= choice.known * n - SLACK:
        return "known"
    return "unknown" if k <= choice.unknown * n + SLACK else "between"


def make_rows(graded: Iterable[Row], choice: Choice) -> Made:
    """The rows of graded questions; a question is held out or refused by its words alone, not by its neighbours."""
    train: list[tuple[float, Row]] = []
    held_out: list[Row] = []
    counts: dict[str, Counter[str]] = {}
    for row in graded:
        count = counts.setdefault(row["source"], Counter())
        key = key_of(messages_of(row))
        decision = decide(row["k"], row["n"], choice)
        language: Any = choice.language if choice.language != "auto" else language_of(row["prompt"][-1]["content"])
        count[decision] += 1
        if place_of(key, "held out") < choice.held_out:
            count["held_out"] += 1
            held_out.append({**row, "decision": decision, "language": language})
            continue
        made, text = _answer(row, key, decision, language, choice)
        if text is None:
            count[made] += 1
        else:
            train.append((place_of(key, "refusals"), _train_row(row, text, made, decision, language)))
    kept = _capped(train, choice.max_refusals)
    for place, (_, row) in enumerate(train):
        counts[row["meta"]["source"]][row["meta"]["answer"] if place in kept else "capped"] += 1
    return Made([row for place, (_, row) in enumerate(train) if place in kept], held_out, counts)


def _answer(row: Row, key: str, decision: Decision, language: Language, choice: Choice) -> tuple[str, str | None]:
    """What is made of a question and the text, or why there is none."""
    if decision == "unknown":
        return "refusal", refusal(key, language)
    if decision == "between" and choice.between == "drop":
        return "dropped", None
    own = own_answer(row["samples"])
    if own is None:
        return "no_finished_answer", None
    return ("answer", own["text"]) if decision == "known" else ("hedge", hedge(key, language, own["text"]))


def own_answer(samples: Sequence[Row]) -> Row | None:
    """The right answer to learn: the shortest that came to its end, of equals the likeliest; None without one.

    The shortest has the least beside the answer that nobody has graded.
    """
    right = [sample for sample in samples if sample["right"] and sample["finished"]]
    return min(right, key=lambda sample: (sample["tokens"], -sample["logprob"], sample["sample"]), default=None)


def _train_row(row: Row, text: str, made: str, decision: Decision, language: Language) -> Row:
    """A chat whose last turn alone is trained."""
    asked = [{**message, "train": False} if message["role"] == "assistant" else message for message in row["prompt"]]
    meta = {
        name: row[name] for name in ("k", "n", "source", "origin", "number", "temperature", "top_p", "seed", "model")
    }
    meta |= {"decision": decision, "answer": made, "language": language}
    made_row: Row = {"messages": [*asked, {"role": "assistant", "content": text}], "meta": meta}
    return made_row | ({"tools": row["tools"]} if row.get("tools") else {})


def _capped(train: Sequence[tuple[float, Row]], most: float) -> set[int]:
    """Places of the rows that stay: all answers, and refusals up to their share, those of the lowest draw first."""
    refusals = [place for place, (_, row) in enumerate(train) if row["meta"]["answer"] == "refusal"]
    others = len(train) - len(refusals)
    room = len(refusals) if most == 1 else int(most / (1 - most) * others + SLACK)
    refusals.sort(key=lambda place: (train[place][0], place))
    return set(range(len(train))) - set(refusals[room:])


def messages_of(row: Row) -> list[Message]:
    """The turns of a graded question."""
    return [Message(role=message["role"], content=message["content"]) for message in row["prompt"]]


# ---- general data ----


def mixed_rows(sources: Sequence[Source], count: int, graded: Iterable[Row], left_out: LeftOut) -> list[Row]:
    """Up to ``count`` conversations, drawn by their words alone.

    ``left_out`` is told of rows that are none, of duplicates, and of those that ask what a graded question asks: such a
    row would leak a held-out answer, or answer what another row refuses.

    Raises:
        ValueError: a source of other rows.
    """
    taken = {key_of(messages_of(row)) for row in graded}
    drawn = heapq.nsmallest(count, _conversations(sources, taken, left_out), key=lambda each: each[0])
    return [row for _, row in drawn]


def _conversations(
    sources: Sequence[Source], taken: set[str], left_out: LeftOut
) -> Iterator[tuple[tuple[float, int], Row]]:
    number, seen = 0, set[str]()
    for source in sources:
        files = resolve(source)
        row_format = detect_format(source, () if source.format != "auto" else first_rows(source, files=files))
        check_record(source, row_format, Conversation)
        for origin, row in rows_of(source, files):
            number += 1
            try:
                record = parse_row(row, row_format, source, origin)
                assert isinstance(record, Conversation)
                key = _new_key(record, taken, seen)
            except BadRow as error:
                left_out(error, origin)
                continue
            seen.add(key)
            yield (place_of(key, "mix"), number), _mix_row(record, source)


def _new_key(record: Conversation, taken: set[str], seen: set[str]) -> str:
    """The key of a conversation that was not seen and asks nothing of what is taken.

    Raises:
        BadRow: of any other.
    """
    if not record.messages:
        raise BadRow("not_chat", "the row is plain text, which has no turns")
    for i, message in enumerate(record.messages):
        if message.role == "user" and taken & {key_of([message]), key_of(record.messages[: i + 1])}:
            raise BadRow("asked", "it asks what a graded question asks")
    key = key_of(record.messages)
    if key in seen:
        raise BadRow("duplicate", "the conversation stands in an earlier row")
    return key


def _mix_row(record: Conversation, source: Source) -> Row:
    row: Row = {"messages": [message_row(message) for message in record.messages]}
    row["meta"] = {"source": source.label, "origin": str(record.origin), "answer": "mix"}
    return row | ({"tools": [dict(tool) for tool in record.tools]} if record.tools else {})


def mix_count(made: int, share: float) -> int:
    """General rows that are ``share`` of a file beside so many others."""
    return round(made * share / (1 - share))
