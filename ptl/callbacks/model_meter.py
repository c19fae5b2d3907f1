"""Measures one model for a distillation report: its distance from the teacher, its answers, its size and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

from ptl.callbacks.comparison import Comparison, compare_models, generation_speed, is_whole, weight_bytes
from ptl.callbacks.held_rows import HeldRows, Question, Task, is_right, text_of
from ptl.callbacks.shape import parameter_counts
from ptl.models.heads import causal_lm
from ptl.models.modes import evaluating
from ptl.models.vocabulary import vocabulary_size
from ptl.rollout.ranks import agreed
from ptl.rollout.sampling import greedy
from ptl.strategies.partition import full_shape

if TYPE_CHECKING:
    from ptl.data.module import ChatDataModule

QUESTIONS_AT_ONCE = 8
PROMPT_TOKENS = 32
"""Tokens of the text that generation goes on from when its speed is measured."""


@dataclass(frozen=True, kw_only=True)
class ModelMeter:
    """What is measured on, and how; all ranks call ``measure`` and ``entry`` together.

    Attributes:
        trainer: of the running fit.
        rows: by part, ``special`` first.
        vocabulary: ids that count; None takes the tokenizer's own size.
        task: how answers are held against the rows' own.
        task_questions: questions of each part.
        max_new_tokens: longest answer.
        speed_tokens: tokens generated to measure the speed, 0 for none.
        notes: what a reader must know about the numbers; measuring adds to it.
    """

    trainer: L.Trainer
    rows: Mapping[str, HeldRows]
    vocabulary: int | None
    task: Task
    task_questions: int
    max_new_tokens: int
    speed_tokens: int
    notes: list[str] = field(default_factory=list)

    def measure(
        self, name: str, model: nn.Module, teacher: nn.Module | None
    ) -> tuple[dict[str, Any], dict[str, Comparison]]:
        """A model's entry in the report, and its sums over all ranks by part."""
        models = [model] if teacher is None else [model, teacher]
        size = min(self.vocabulary or vocabulary_size(self._data.renderer.tokenizer), *map(_head_rows, models))
        found: dict[str, Comparison] = {}
        for part, rows in self.rows.items():
            batches = rows.batches(self._data, self.trainer.global_rank, self.trainer.world_size)
            with self.trainer.strategy.precision_plugin.val_step_context():
                own = compare_models(model, teacher, batches, size, sources=len(rows.sources))
            found[part] = replace(own, sums=self._summed(own.sums))
        return self.entry(name, model, found), found

    def entry(self, name: str, model: nn.Module, found: Mapping[str, Comparison]) -> dict[str, Any]:
        """What the report says of a model: its measures by part and source, its answers, its size and its speed."""
        whole = is_whole(model)
        if not whole and (self.task != "none" or self.speed_tokens):
            self.notes.append(f"The model `{name}` is sharded, so its answers and its speed were not measured.")
        parts = {}
        for part, comparison in found.items():
            answers = self._answers(model, self.rows[part]) if whole and self.task != "none" else None
            parts[part] = {
                "all": {**comparison.measures(), **_accuracy(answers)},
                "sources": {
                    source: {**comparison.measures(i), **_accuracy(None if answers is None else answers[i : i + 1])}
                    for i, source in enumerate(self.rows[part].sources)
                },
            }
        return {
            "name": name,
            "parameters": parameter_counts(model)[0],
            "bytes": weight_bytes(model),
            "tokens_per_second": self._speed(model) if whole and self.speed_tokens else None,
            "parts": parts,
        }

    @property
    def _data(self) -> ChatDataModule:
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the host."""
        here = values.to(self.trainer.strategy.root_device)
        total: Any = self.trainer.strategy.reduce(here, reduce_op="sum")
        return total.cpu()

    def _answers(self, model: nn.Module, rows: HeldRows) -> Tensor:
        """float64 [S, 2], right answers and questions of each source, over all ranks."""
        renderer = self._data.renderer
        asked = rows.questions(renderer, self.task, self.task_questions)
        asked.sort(key=lambda question: len(question.prompt))
        mine = asked[self.trainer.global_rank :: self.trainer.world_size]
        graded = partial(self._graded, model, mine, len(rows.sources))
        return self._summed(agreed(self.trainer.strategy, graded, "answered the report's questions"))

    def _graded(self, model: nn.Module, asked: Sequence[Question], sources: int) -> Tensor:
        """float64 [S, 2], right answers and questions of each source, of the questions given."""
        renderer = self._data.renderer
        counts = torch.zeros(sources, 2, dtype=torch.float64)
        write = partial(greedy, model, stop=renderer.terminators, max_new_tokens=self.max_new_tokens)
        with evaluating(model), self.trainer.strategy.precision_plugin.val_step_context():
            for start in range(0, len(asked), QUESTIONS_AT_ONCE):
                some = asked[start : start + QUESTIONS_AT_ONCE]
                for question, ids in zip(some, write([question.prompt for question in some]), strict=True):
                    right = is_right(self.task, text_of(renderer, ids), text_of(renderer, question.answer))
                    counts[question.source] += torch.tensor([right, 1], dtype=torch.float64)
        return counts

    def _speed(self, model: nn.Module) -> float | None:
        """On rank 0, while the others wait: ranks that share a processor would slow each other down."""

        def measured() -> float | None:
            if not self.trainer.is_global_zero:
                return None
            rows = self.rows["special"]
            prompt = rows.part.prepared.rows[int(rows.rows[0])]["ids"][:PROMPT_TOKENS]
            with self.trainer.strategy.precision_plugin.val_step_context():
                return generation_speed(model, prompt, self.speed_tokens)

        return agreed(self.trainer.strategy, measured, "measured a model's speed")


def _head_rows(model: nn.Module) -> int:
    return full_shape(causal_lm(model).get_output_embeddings().weight)[0]


def _accuracy(answers: Tensor | None) -> dict[str, Any]:
    """``accuracy`` and ``questions`` out of sums [S, 2]; nothing where nothing was asked."""
    if answers is None:
        return {}
    right, asked = answers.sum(0).tolist()
    return {"accuracy": right / asked if asked else None, "questions": int(asked)}
