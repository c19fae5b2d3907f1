"""Sequence-level distillation: the teacher writes the last answer of each conversation, for a student to learn by SFT.

The student then sees the words that the teacher chooses and not its distribution (arXiv:1606.07947, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ptl.data.encode import Encoder
from ptl.data.render import Renderer, RenderError
from ptl.data.sources import BadRow
from ptl.rollout.sampling import generate
from ptl.synth.lines import append_lines, settle, whole_lines
from ptl.synth.questions import Question, batches, context_length, ends, message_row, questions
from ptl.types import Origin


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
        for name in ("max_new_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")


def write_answers(model: nn.Module, encoder: Encoder, path: Path, writing: Writing, report: Any) -> dict[str, int]:
    """Appends a row of messages for each answer to ``path``, as it is written; goes on where a former call stopped.

    Each line is on disk before the next batch begins. Beside ``path`` lie ``path.settings.json``, what the answers are
    made with, and ``path.left_out.jsonl``, the numbers of conversations that have no row and why.

    Args:
        model: the teacher, in eval mode.
        encoder: names the sources and renders their prompts.
        path: a .jsonl file.
        writing: settings.
        report: called with the number of conversations done and of tokens written after each batch.

    Returns:
        Counts: ``answers`` in the file, and how many are left out by reason.

    Raises:
        ValueError: the file was begun with other settings, or is not such a file.
    """
    left_out = path.with_name(path.name + ".left_out.jsonl")
    settle(path, writing)
    known = {number for number, _ in whole_lines(path)}
    answers, counts = len(known), Counter[str]()
    for number, reason in whole_lines(left_out):
        known.add(number)
        counts[str(reason)] += 1
    terminators = ends(model, encoder.renderer)

    def refuse(error: BadRow | RenderError, origin: Origin) -> None:
        counts[error.reason] += 1

    every = questions(encoder.sources, encoder.formats, encoder.renderer, refuse)
    todo = (question for question in every if question.number not in known)
    sizes = {"max_new_tokens": writing.max_new_tokens, "batch_tokens": writing.batch_tokens}
    for batch in batches(todo, room=context_length(model), **sizes):
        asked = [(question, limit) for question, limit in batch if limit > 0]
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
        rows, refused = [], [_refusal(question, "too_long") for question, limit in batch if limit <= 0]
        for (question, _), ids in zip(asked, written):
            row, reason = _row(question, ids, encoder.renderer, terminators, writing)
            (refused if row is None else rows).append(row if row is not None else _refusal(question, reason))
        append_lines(left_out, refused)
        append_lines(path, rows)
        answers += len(rows)
        counts.update(entry["reason"] for entry in refused)
        report(len(batch), sum(len(ids) for ids in written))
    return {"answers": answers, **counts}


def _row(
    question: Question, ids: list[int], renderer: Renderer, stop: Sequence[int], writing: Writing
) -> tuple[dict[str, Any] | None, str]:
    """The row of an answer, or None and the reason why it has none."""
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
    return {**row, "number": question.number, "origin": str(question.origin), "finished": ended}, ""


def _refusal(question: Question, reason: str) -> dict[str, Any]:
    return {"number": question.number, "reason": reason, "origin": str(question.origin)}
