"""Sequence-level distillation: the teacher writes the last answer of each conversation, for a student to learn by SFT.

The student then sees the words that the teacher chooses and not its distribution (arXiv:1606.07947, section 3.2).
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ptl.data.encode import Encoder
from ptl.data.files import resolve
from ptl.data.mapped import published
from ptl.data.readers import blocks
from ptl.data.records import parse_row
from ptl.data.render import Renderer, RenderError, stop_token_ids
from ptl.data.sources import BadRow
from ptl.rollout.sampling import generate
from ptl.synth.teacher import grouped
from ptl.types import Conversation, Message, Origin

WINDOW = 1024
"""Conversations that are sorted by length at a time."""


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


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation up to the answer that is wanted.

    Attributes:
        number: of the conversation, from 0, over all sources.
        record: the conversation, without its last answer.
        ids: the rendered prompt.
    """

    number: int
    record: Conversation
    ids: list[int]


# ---- which questions ----


def questions(encoder: Encoder, counts: Counter[str]) -> Iterator[Question]:
    """The questions of an encoder's sources, in order; rows without one are counted under their reason."""
    number = 0
    for source, row_format in zip(encoder.sources, encoder.formats):
        for block in blocks(source, files=resolve(source)):
            for line, row in block.rows():
                number += 1
                try:
                    if isinstance(row, BadRow):
                        raise row
                    record = parse_row(row, row_format, source, Origin(block.file, line))
                    yield _question(number - 1, record, encoder.renderer)
                except (BadRow, RenderError) as error:
                    counts[error.reason] += 1


def _question(number: int, record: Any, renderer: Renderer) -> Question:
    last = max((i for i, message in enumerate(record.messages) if message.role == "assistant"), default=-1)
    if last < 1:
        raise BadRow("no_question", "there is no assistant turn after another one, so nothing to answer")
    asked = Conversation(messages=record.messages[:last], tools=record.tools, origin=record.origin)
    return Question(number=number, record=asked, ids=renderer.prompt(asked.messages, asked.tools))


# ---- writing ----


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
    terminators = stop_token_ids(encoder.renderer, _own_ends(model))
    room = _context_length(model)
    todo = (question for question in questions(encoder, counts) if question.number not in known)
    for window in iter(lambda: list(itertools.islice(todo, WINDOW)), []):
        window.sort(key=lambda question: (-len(question.ids), question.number))
        limits = [min(writing.max_new_tokens, room - len(question.ids)) for question in window]
        sizes = [len(question.ids) + max(0, limit) for question, limit in zip(window, limits)]
        for group in grouped(sizes, writing.batch_tokens):
            asked = [window[index] for index in group if limits[index] > 0]
            written = generate(
                model,
                [question.ids for question in asked],
                [question.number for question in asked],
                stop=terminators,
                limits=[limits[index] for index in group if limits[index] > 0],
                vocab=len(encoder.renderer.tokenizer),
                temperature=writing.temperature,
                seed=writing.seed,
            )
            rows, refused = [], [_refusal(window[index], "too_long") for index in group if limits[index] <= 0]
            for question, ids in zip(asked, written):
                row, reason = _row(question, ids, encoder.renderer, terminators, writing)
                (refused if row is None else rows).append(row if row is not None else _refusal(question, reason))
            append_lines(left_out, refused)
            append_lines(path, rows)
            answers += len(rows)
            counts.update(entry["reason"] for entry in refused)
            report(len(group), sum(len(ids) for ids in written))
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
    messages = [_as_row(message) for message in question.record.messages]
    row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": text}]}
    if question.record.tools:
        row["tools"] = [dict(tool) for tool in question.record.tools]
    return {**row, "number": question.number, "origin": str(question.record.origin), "finished": ended}, ""


def _as_row(message: Message) -> dict[str, Any]:
    return message.as_dict() | ({} if message.train is None else {"train": message.train})


def _refusal(question: Question, reason: str) -> dict[str, Any]:
    return {"number": question.number, "reason": reason, "origin": str(question.record.origin)}


# ---- files ----


def settle(path: Path, writing: Writing) -> None:
    """Writes the settings beside a new file of answers; refuses to go on with a file that has others."""
    beside = path.with_name(path.name + ".settings.json")
    wanted = asdict(writing)
    if beside.is_file():
        found = json.loads(beside.read_text(encoding="utf-8"))
        names = [name for name in wanted if name != "batch_tokens" and found.get(name) != wanted[name]]
        if names:
            told = "; ".join(f"{name} {found.get(name)} against {wanted[name]}" for name in names)
            raise ValueError(f"{path} was begun with other settings ({told}): give another file, or delete it")
    elif path.exists():
        raise ValueError(f"{path} is there and was not begun by this command: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(beside) as partial:
        partial.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def whole_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Number and reason of each row of a .jsonl file, after a torn last line has been cut off; none without a file."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = 0
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
        file.truncate(whole)
        os.fsync(file.fileno())
        file.seek(0)
        for count, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                yield entry["number"], entry.get("reason")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{count}: no row of answers ({error}): give another file") from error


def append_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a .jsonl file and waits until they are on disk."""
    if not rows:
        return
    with path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())


def _own_ends(model: Any) -> int | list[int] | None:
    """The ids at which the model's own generation configuration stops."""
    return getattr(getattr(model, "generation_config", None), "eos_token_id", None)


def _context_length(model: Any) -> int:
    """Positions that the model was made for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
