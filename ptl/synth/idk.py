"""Questions with known answers, put to a model several times: which of its answers are right."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ptl.data.render import Renderer
from ptl.data.sources import BadRow
from ptl.rewards.matching import match
from ptl.rewards.refusals import refuses
from ptl.rollout.sampling import Sampled, sample
from ptl.synth.asking import LeftOut, Outcome, Todo, answer_all, check_least
from ptl.synth.idk_texts import question_key
from ptl.synth.judge import Case, Judge
from ptl.synth.questions import Question, context_length, ends, message_row
from ptl.types import Message


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How questions are asked and graded. The same settings give the same answers, whatever was done before a stop.

    Attributes:
        model: digest of the model.
        renderer: ``Renderer.fingerprint``.
        judge: digest of the judge, where there is one.
        samples: answers to each question, N, 1 or more.
        temperature: of the draws, 0 or more; 0 takes the likeliest token, with one answer alone.
        top_p: in (0, 1], see ``ptl.rollout.sampling.sample``.
        max_new_tokens: most tokens of an answer.
        seed: of the draws, 0 or more; with the question's number and the answer's place it gives them.
        system: text of a system turn for questions that have none.
        batch_tokens: most tokens of a batch, questions with room for their answers.

    Raises:
        ValueError: a number out of its range.
    """

    model: str
    renderer: str
    judge: str | None = None
    samples: int = 3
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    system: str | None = None
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        check_least(self, samples=1, max_new_tokens=1, batch_tokens=1, seed=0)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature:g}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("--temperature must be above 0 with several --samples: at 0 all answers are the same")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {self.top_p:g}")


class Graded(NamedTuple):
    """What came of the questions.

    Attributes:
        questions: how many were asked, or are to be.
        rows: rows in the file; None where other processes have not done their share yet and there is no file.
        left_out: of the rows without a question or an answer.
    """

    questions: int
    rows: int | None
    left_out: LeftOut


def grade_all(
    model: nn.Module,
    asked: Iterable[Question],
    renderer: Renderer,
    path: Path,
    asking: Asking,
    left_out: LeftOut,
    *,
    name: str,
    judge: Judge | None = None,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[int], None] = lambda questions: None,
) -> Graded:
    """Writes a row for each question to ``path``, with the model's answers and their grades, as ``answer_all`` has it.

    A row has ``prompt`` (messages), what is known of the question (``answers``, ``source``), ``k`` right answers of
    ``n``, ``samples``, how they were drawn and by which model.

    Args:
        model: in eval mode.
        asked: the questions, with the ``answers`` that are right and their ``source`` in ``known``.
        renderer: renders the questions.
        path: a .jsonl file.
        asking: settings.
        left_out: that ``asked`` tells of the rows without a question.
        name: the model's, for the rows.
        judge: is asked where the rules find no accepted answer.
        rank, world_size: of this process.
        report: called with the number of questions done after each batch.

    Raises:
        ValueError: the file was begun with other settings or questions, there is none, or the model gives NaN.
    """
    stop = ends(model, renderer)

    def answer(todo: Todo, keys: Mapping[int, str]) -> Iterator[Outcome]:
        drawn = _drawn(model, renderer, [each for each in todo if each[1] > 0], asking, stop)
        said = {n: _said(q, drawn[n], renderer, stop) for q, _ in todo if (n := q.number) in drawn}
        graded = _graded(said, todo, judge)
        for question, _ in todo:
            number = question.number
            reason = None if number in graded else "too_long"
            entry = {"number": number, "key": keys[number], "reason": reason, "origin": str(question.origin)}
            yield None if reason else _row(question, graded[number], asking, name), entry

    how: dict[str, Any] = {"rank": rank, "world_size": world_size, "report": report}
    how |= {"room": context_length(model), "samples": asking.samples}
    questions, items = answer_all(distinct(asked, left_out), answer, path, asking, left_out, **how)
    rows = None if items is None else sum(done.entry["reason"] is None for done in items)
    return Graded(questions, rows, left_out)


def distinct(asked: Iterable[Question], left_out: LeftOut) -> Iterator[Question]:
    """The questions without those that were asked before in other capitals, punctuation or articles."""
    seen: set[bytes] = set()
    for question in asked:
        key = hashlib.blake2b(key_of(question.messages).encode(), digest_size=16).digest()
        if key in seen:
            left_out(BadRow("duplicate", "the question stands in an earlier row"), question.origin)
            continue
        seen.add(key)
        yield question


def key_of(messages: Sequence[Message]) -> str:
    """``question_key`` of the turns; a system turn is no part of a question."""
    return question_key([message.content for message in messages if message.role not in ("system", "developer")])


def _drawn(
    model: nn.Module, renderer: Renderer, todo: Todo, asking: Asking, stop: Sequence[int]
) -> dict[int, list[Sampled]]:
    numbers = [question.number for question, _ in todo]
    drawn = sample(
        model,
        [question.ids for question, _ in todo],
        numbers,
        samples=asking.samples,
        stop=stop,
        limits=[limit for _, limit in todo],
        vocab=len(renderer.tokenizer),
        temperature=asking.temperature,
        top_p=asking.top_p,
        seed=asking.seed,
    )
    return dict(zip(numbers, drawn))


def _said(
    question: Question, drawn: Sequence[Sampled], renderer: Renderer, stop: Sequence[int]
) -> list[dict[str, Any]]:
    """The answers to a question, graded by the rules."""
    said = []
    for place, answer in enumerate(drawn):
        logprob = math.fsum(answer.logprobs)
        if not math.isfinite(logprob):
            raise ValueError(f"{question.origin}: the model gives numbers that are not finite: its weights are damaged")
        ended = answer.ids[-1] in stop
        text = str(renderer.tokenizer.decode(answer.ids[: len(answer.ids) - ended], skip_special_tokens=True)).strip()
        refused = refuses(text)
        rule = None if refused else match(text, question.known["answers"], question.messages[-1].content)
        said.append(
            {"text": text, "right": rule is not None, "rule": rule, "refused": refused, "finished": ended}
            | {"sample": place, "tokens": len(answer.ids), "logprob": logprob}
        )
    return said


def _graded(said: dict[int, list[dict[str, Any]]], todo: Todo, judge: Judge | None) -> dict[int, list[dict[str, Any]]]:
    """The same, after the judge has had its say on those that no rule accepts and that do answer."""
    if judge is None:
        return said
    open_ = [
        (question, answer)
        for question, _ in todo
        for answer in said.get(question.number, ())
        if not answer["right"] and not answer["refused"] and answer["text"]
    ]
    cases = [Case(q.messages[-1].content, tuple(q.known["answers"]), answer["text"]) for q, answer in open_]
    for (_, answer), margin in zip(open_, judge.margins(cases)):
        answer["margin"] = margin
        if margin > 0:
            answer |= {"right": True, "rule": "judge"}
    return said


def _row(question: Question, samples: list[dict[str, Any]], asking: Asking, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": [message_row(message) for message in question.messages]}
    row |= {**question.known, "k": sum(answer["right"] for answer in samples), "n": len(samples), "samples": samples}
    row |= {"temperature": asking.temperature, "top_p": asking.top_p, "seed": asking.seed}
    row |= {"number": question.number, "model": f"{name}@{asking.model[:12]}", "origin": str(question.origin)}
    return row | ({"tools": [dict(tool) for tool in question.tools]} if question.tools else {})
