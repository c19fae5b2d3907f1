"""Sequence-level distillation: the teacher writes the last answer of each conversation, for a student to learn by SFT.

The student then sees the words that the teacher chooses and not its distribution (arXiv:1606.07947, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ptl.data.encode import Encoder
from ptl.data.render import Renderer
from ptl.rollout.sampling import generate
from ptl.synth.asking import LeftOut, Outcome, Todo, answer_all, check_least
from ptl.synth.questions import Question, context_length, ends, message_row, questions


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How answers are written. The same settings give the same answers, whatever was done before a stop.

    Attributes:
        teacher: digest of the teacher.
        renderer: ``Renderer.fingerprint``.
        temperature: 0 takes the likeliest token; else tokens are drawn from ``softmax(z / T)``.
        max_new_tokens: most tokens of an answer.
        batch_tokens: most tokens of a batch, prompts with room for their answers.
        seed: of the draws; with the conversation's number it gives them.
        keep_unfinished: keep answers that were cut at the limit.

    Raises:
        ValueError: a number out of its range.
    """

    teacher: str
    renderer: str
    temperature: float = 0.0
    max_new_tokens: int = 512
    batch_tokens: int = 8192
    seed: int = 0
    keep_unfinished: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature:g}")
        check_least(self, max_new_tokens=1, batch_tokens=1, seed=0)


class Answers(NamedTuple):
    """What came of the conversations.

    Attributes:
        rows: answers in the file; None where other processes have not done their share yet and there is no file.
        left_out: tells of the conversations without an answer.
    """

    rows: int | None
    left_out: LeftOut


def write_answers(
    model: nn.Module,
    encoder: Encoder,
    path: Path,
    writing: Writing,
    *,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[int], None] = lambda conversations: None,
) -> Answers:
    """Writes a row of messages for each conversation to ``path``, as ``answer_all`` has it.

    Args:
        model: the teacher, in eval mode.
        encoder: names the sources and renders their prompts.
        path: a .jsonl file.
        writing: settings.
        rank, world_size: of this process.
        report: called with the number of conversations done after each batch.

    Raises:
        ValueError: the file was begun with other settings or conversations, or none has a question.
    """
    left_out = LeftOut()
    terminators = ends(model, encoder.renderer)

    def answer(todo: Todo, keys: Mapping[int, str]) -> Iterator[Outcome]:
        asked = [(question, limit) for question, limit in todo if limit > 0]
        written = generate(
            model,
            [question.ids for question, _ in asked],
            [question.number for question, _ in asked],
            stop=terminators,
            limits=[limit for _, limit in asked],
            vocab=len(encoder.renderer.tokenizer),
            temperature=writing.temperature,
            seed=writing.seed,
        )
        answers = {question.number: ids for (question, _), ids in zip(asked, written)}
        for question, _ in todo:
            number, row, reason = question.number, None, "too_long"
            if number in answers:
                row, reason = _row(question, answers[number], encoder.renderer, terminators, writing)
            yield row, {"number": number, "key": keys[number], "reason": reason, "origin": str(question.origin)}

    every = questions(encoder.sources, encoder.formats, encoder.renderer, left_out)
    how: dict[str, Any] = {"room": context_length(model), "samples": 1}
    how |= {"rank": rank, "world_size": world_size, "report": report}
    _, items = answer_all(every, answer, path, writing, left_out, **how)
    return Answers(None if items is None else sum(done.entry["reason"] is None for done in items), left_out)


def _row(
    question: Question, ids: list[int], renderer: Renderer, stop: Sequence[int], writing: Writing
) -> tuple[dict[str, Any] | None, str | None]:
    """The row of an answer, or None, and the reason why it has none."""
    ended = bool(ids) and ids[-1] in stop
    if not ended and not writing.keep_unfinished:
        return None, "unfinished"
    text = str(renderer.tokenizer.decode(ids[: len(ids) - ended], skip_special_tokens=True))
    if not text.strip():
        return None, "empty"
    messages = [message_row(message) for message in question.messages]
    row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": text}]}
    if question.tools:
        row["tools"] = [dict(tool) for tool in question.tools]
    return {**row, "number": question.number, "origin": str(question.origin), "finished": ended}, None
