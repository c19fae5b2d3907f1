"""Several answers of a model to each prompt of a data set, for people to rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ptl.data.render import Renderer
from ptl.data.sources import Source
from ptl.rollout.sampling import Sampled, sample
from ptl.synth.asking import LeftOut, Outcome, Todo, answer_all, check_least
from ptl.synth.questions import Question, context_length, ends, questions


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
        check_least(self, k=2, max_new_tokens=1, batch_tokens=1, seed=0)


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
    """Writes a row of answers for each prompt to ``path``, as ``answer_all`` has it.

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
    left_out = LeftOut()

    def answer(todo: Todo, keys: Mapping[int, str]) -> Iterator[Outcome]:
        return _answered(model, renderer, todo, sampling, keys, name)

    asked = questions(sources, formats, renderer, left_out, system=sampling.system)
    how: dict[str, Any] = {"rank": rank, "world_size": world_size, "report": report}
    how |= {"room": context_length(model), "samples": sampling.k}
    prompts, items = answer_all(asked, answer, path, sampling, left_out, **how)
    dropped, rows, answers = Counter[str](), 0, 0
    for done in items or ():
        dropped.update(done.entry["dropped"])
        answers += done.entry["answers"]
        rows += done.entry["reason"] is None
    return Written(prompts, None if items is None else rows, answers, left_out.counts, dropped, left_out.first)


def _answered(
    model: nn.Module,
    renderer: Renderer,
    todo: Todo,
    sampling: Sampling,
    keys: Mapping[int, str],
    name: str,
) -> Iterator[Outcome]:
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
