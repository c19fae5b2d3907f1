"""Several answers of a model to each prompt of a data set, for people to rank."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ptl.data.render import Renderer, RenderError
from ptl.data.sources import BadRow, Source
from ptl.rollout.sampling import Sampled, sample
from ptl.synth.lines import settle
from ptl.synth.questions import Question, batches, context_length, ends, questions
from ptl.synth.shares import Shares
from ptl.types import Origin


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How candidates are drawn. The same settings give the same answers, whatever was done before a stop.

    Attributes:
        model: digest of the model.
        renderer: ``Renderer.fingerprint``.
        k: answers drawn for each prompt, 2 or more.
        temperature: above 0; of ``softmax(z / T)``, which is drawn from.
        top_p: in (0, 1], see ``ptl.rollout.sampling.sample``.
        max_new_tokens: most tokens of an answer.
        seed: of the draws, 0 or more; with the prompt's number and the answer's place it gives them.
        system: text of a system turn for prompts that have none.
        keep_unfinished: keep answers that were cut at the limit.
        batch_tokens: most tokens of a batch, prompts with room for their answers.

    Raises:
        ValueError: a number out of its range.
    """

    model: str
    renderer: str
    k: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    system: str | None = None
    keep_unfinished: bool = False
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"--temperature must be above 0, got {self.temperature:g}: at 0 all answers are the same")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1, got {self.top_p:g}")
        for name, least in (("k", 2), ("max_new_tokens", 1), ("batch_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be {least} or more, got {getattr(self, name)}")


class Written(NamedTuple):
    """What came of the prompts.

    Attributes:
        prompts: prompts read, without those that have no question.
        rows: rows in the file; None where other processes have not done their share yet and there is no file.
        answers: answers in those rows.
        left_out: reason -> prompts without a row.
        dropped: reason -> answers that were drawn and are in no row, or were left out of one.
        first: reason of ``left_out`` -> file and line of the first such prompt.
    """

    prompts: int
    rows: int | None
    answers: int
    left_out: Counter[str]
    dropped: Counter[str]
    first: dict[str, str]


def write_candidates(
    model: nn.Module,
    sources: Sequence[Source],
    formats: Sequence[str],
    renderer: Renderer,
    path: Path,
    sampling: Sampling,
    *,
    name: str,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[int], None] = lambda prompts: None,
) -> Written:
    """Writes a row of answers for each prompt to ``path``, with all processes that are given the same arguments.

    Each process appends whole batches to a part beside ``path``; the one that finds all done joins them in the order
    of the prompts. A call that was killed is repeated to go on. Which prompts share a batch depends on the data and
    ``batch_tokens`` alone, so that even the rounding of its numbers is that of a run which was not killed.

    Args:
        model: in eval mode.
        sources, formats: see ``questions``.
        renderer: renders the prompts.
        path: a .jsonl file.
        sampling: settings.
        name: the model's, for the rows.
        rank, world_size: of this process.
        report: called with the number of prompts done after each batch.

    Raises:
        ValueError: the file was begun with other settings or prompts, there is no prompt, or the model gives NaN.
    """
    settle(path, sampling)
    shares = Shares(path, rank)
    known, numbers = shares.done(), []
    left_out, first, why = Counter[str](), dict[str, str](), list[str]()

    def refuse(error: BadRow | RenderError, origin: Origin) -> None:
        left_out[error.reason] += 1
        first.setdefault(error.reason, str(origin))
        if not why:
            why.append(f"{origin}: {error}")

    asked = questions(sources, formats, renderer, refuse, system=sampling.system)
    sizes = {"max_new_tokens": sampling.max_new_tokens, "batch_tokens": sampling.batch_tokens, "answers": sampling.k}
    for index, batch in enumerate(batches(asked, room=context_length(model), **sizes)):
        keys = {question.number: _key(question, sampling) for question, _ in batch}
        numbers += keys
        for question, _ in batch:
            if question.number in known and known[question.number].entry["key"] != keys[question.number]:
                raise ValueError(
                    f"{question.origin}: {path} was begun with other prompts: give another file, or delete {path}*"
                )
        todo = [(question, limit) for question, limit in batch if question.number not in known]
        if todo and index % world_size == rank:
            results = list(_answered(model, renderer, todo, sampling, keys, name))
            shares.append([row for row, _ in results if row is not None], [entry for _, entry in results])
            report(len(todo))
    if not numbers:
        raise ValueError(
            f"no row has a prompt ({left_out.total():,} are left out, the first: {why[0] if why else '-'})"
        )
    items = shares.join(sorted(numbers))
    dropped, rows, answers = Counter[str](), 0, 0
    for done in items or ():
        dropped.update(done.entry["dropped"])
        answers += done.entry["answers"]
        if done.entry["reason"] is None:
            rows += 1
        else:
            left_out[done.entry["reason"]] += 1
            first.setdefault(done.entry["reason"], done.entry["origin"])
    return Written(len(numbers), None if items is None else rows, answers, left_out, dropped, first)


def _key(question: Question, sampling: Sampling) -> str:
    """Names a prompt and how it is answered; what ``batch_tokens`` is does not matter."""
    settings = {**asdict(sampling), "batch_tokens": None}
    text = json.dumps([settings, question.number, question.ids], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _answered(
    model: nn.Module,
    renderer: Renderer,
    todo: Sequence[tuple[Question, int]],
    sampling: Sampling,
    keys: dict[int, str],
    name: str,
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any]]]:
    """The row of each prompt, or None, and what became of it."""
    stop = ends(model, renderer)
    asked = [(question, limit) for question, limit in todo if limit > 0]
    drawn = sample(
        model,
        [question.ids for question, _ in asked],
        [question.number for question, _ in asked],
        samples=sampling.k,
        stop=stop,
        limits=[limit for _, limit in asked],
        vocab=len(renderer.tokenizer),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    answers = {question.number: each for (question, _), each in zip(asked, drawn)}
    for question, _ in todo:
        key, kept, dropped = keys[question.number], [], Counter[str]()
        if question.number in answers:
            kept, dropped = _distinct(answers[question.number], question, renderer, stop, sampling, name)
        reason = "too_long" if question.number not in answers else "too_few_answers" if len(kept) < 2 else None
        entry = {"number": question.number, "key": key, "reason": reason, "origin": str(question.origin)}
        entry |= {"answers": 0 if reason else len(kept), "dropped": dropped}
        yield None if reason else _row(question, kept, key), entry


def _distinct(
    drawn: Sequence[Sampled], question: Question, renderer: Renderer, stop: Sequence[int], sampling: Sampling, name: str
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The completions of a row, and how many answers are none, by reason.

    Answers that differ in white space alone are the same.
    """
    kept: dict[str, dict[str, Any]] = {}
    dropped = Counter[str]()
    for place, answer in enumerate(drawn):
        logprob = math.fsum(answer.logprobs)
        if not math.isfinite(logprob):
            raise ValueError(f"{question.origin}: the model gives numbers that are not finite: its weights are damaged")
        ended = answer.ids[-1] in stop
        said = str(renderer.tokenizer.decode(answer.ids[: len(answer.ids) - ended], skip_special_tokens=True))
        bare = " ".join(said.split())
        if not ended and not sampling.keep_unfinished:
            dropped["unfinished"] += 1
        elif not bare:
            dropped["empty"] += 1
        elif bare in kept:
            dropped["duplicate"] += 1
        else:
            meta = {"seed": sampling.seed, "number": question.number, "sample": place, "logprob": logprob}
            meta |= {"tokens": len(answer.ids), "finished": ended, "temperature": sampling.temperature}
            meta |= {"top_p": sampling.top_p, "model": f"{name}@{sampling.model[:12]}"}
            kept[bare] = {"messages": [{"role": "assistant", "content": said}], "rank": None, "meta": meta}
    return list(kept.values()), dropped


def _row(question: Question, completions: list[dict[str, Any]], key: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"{question.number}-{key}",
        "prompt": [message.as_dict() for message in question.messages],
        "completions": completions,
        "annotator": None,
        "origin": str(question.origin),
    }
    return row | ({"tools": [dict(tool) for tool in question.tools]} if question.tools else {})
