"""A small real distillation for the report's tests: an objective with a live teacher; importable by rank processes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch

from ptl.callbacks.distill_report import DistillReport
from ptl.callbacks.held_rows import text_of
from ptl.callbacks.record import RunRecord
from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation
from ptl.data.sources import Source
from ptl.models.heads import hidden_states, lm_head, shifted_targets
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.base import Objective
from ptl.objectives.distillation import Distillation
from ptl.rollout.sampling import greedy
from ptl.strategies import partition
from ptl.types import LossOutput, Message, TokenBatch
from tests import tiny
from tests.callbacks.parts import trainer
from tests.objectives.law import write_rows
from tests.ranks import rank

MAX_NEW_TOKENS = 6


class LiveTeacher(Objective):
    """Forward KL to a teacher in the same process, by plain logits."""

    metric_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, policy: ModelSpec, teacher: ModelSpec, *, live: bool = True, **options: Any) -> None:
        super().__init__(policy, **options)
        self.teacher = Named(teacher)
        self.live = live
        self._teacher: list[torch.nn.Module] = []

    def configure_model(self) -> None:
        super().configure_model()
        if not self._teacher:
            self._teacher.append(self.teacher.model.build().eval().requires_grad_(False))

    def teacher_model(self) -> torch.nn.Module | None:
        return self._teacher[0] if self.live else None

    def loss(self, batch: TokenBatch) -> LossOutput:
        positions, _, weights = shifted_targets(batch)
        student, teacher = (_logprobs(model, batch, positions) for model in (self.policy, self._teacher[0]))
        kl = (teacher.exp() * (teacher - student)).sum(-1)
        return LossOutput((kl * weights).sum(), weights.sum(), {})


class Named:
    """What the report asks of an objective's teacher: its model's spec."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model


def _logprobs(model: torch.nn.Module, batch: TokenBatch, positions: torch.Tensor) -> torch.Tensor:
    hidden = hidden_states(model, batch).flatten(0, 1)[positions]
    return torch.log_softmax(hidden @ lm_head(model).weight.t(), -1)


def make_folder(folder: Path) -> Path:
    """Student, teacher and rows, made once by a test."""
    tokenizer = tiny.make_tokenizer()
    tiny.save_folder(folder / "student", tokenizer, layers=1, seed=1, attention_dropout=0.1)
    tiny.save_folder(folder / "teacher", tokenizer, layers=2, hidden=64, seed=2)
    write_rows(folder / "special.jsonl", count=60)
    write_rows(folder / "other.jsonl", count=11, seed=5)
    sums = [{"q": f"What is {a}+{b}?", "a": f"The answer is {a + b}."} for a in range(6) for b in range(2)]
    rows = [{"messages": [{"role": "user", "content": s["q"]}, {"role": "assistant", "content": s["a"]}]} for s in sums]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


_SGD: dict[str, Any] = {
    "optimizer": Optimizer(kind="sgd", lr=0.5),
    "schedule": Schedule(kind="constant", warmup=0),
}


def objective(folder: Path, *, live: bool = True) -> LiveTeacher:
    student, teacher = (ModelSpec(name=str(folder / name)) for name in ("student", "teacher"))
    return LiveTeacher(student, teacher, live=live, **_SGD)


def distillation(folder: Path, *, placement: Any = "replica") -> Distillation:
    student, teacher = (ModelSpec(name=str(folder / name)) for name in ("student", "teacher"))
    return Distillation(student, Teacher(model=teacher, placement=placement), **_SGD)


def chat(folder: Path, *, layout: str = "packed", pack_to: int | None = None, held_out: float = 0.3) -> ChatDataModule:
    data = ChatDataModule(
        [Source(path=str(folder / "special.jsonl"), name="a"), Source(path=str(folder / "other.jsonl"), name="b")],
        val_fraction=held_out,
        max_length=256,
        layout=layout,  # pyright: ignore[reportArgumentType]
        pack_to=pack_to,
        micro_batch_size=2,
        preparation=Preparation(cache_dir=str(folder / "cache"), num_proc=1),
    )
    data.bind(view=LiveTeacher.view, tokenizer=str(folder / "student"))
    return data


def report(folder: Path, **options: Any) -> DistillReport:
    """A report with both kinds of rows, quiet and short."""
    general = [Source(path=str(folder / "general.jsonl"), name="sums")]
    return DistillReport(
        **{
            "general": general, "console": False, "speed_tokens": 4, "max_new_tokens": MAX_NEW_TOKENS, "task": "number",
            **options,
        }
    )  # fmt: skip


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "distill_report.json").read_text())


def let_teacher_know(folder: Path) -> int:
    """Gives the folder a teacher that says words, and these as answers of every other general row; returns how many."""
    renderer = chat(folder).renderer
    # A random model with a tied head says its prompt's last token, here a blank, again and again.
    tiny.save_folder(folder / "teacher", tiny.make_tokenizer(), layers=2, hidden=64, seed=2, tie=False)
    teacher = ModelSpec(name=str(folder / "teacher")).build().eval()
    path = folder / "general.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::2]:
        prompt = renderer.prompt((Message(role="user", content=row["messages"][0]["content"]),))
        said = greedy(teacher, [prompt], stop=renderer.terminators, max_new_tokens=MAX_NEW_TOKENS)[0]
        row["messages"][1]["content"] = text_of(renderer, said)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows[::2])


ON_RANKS = {
    "ddp": "replica",
    "zero3": "replica",
    "ddp-speed-alone": "sharded",
    "zero3-sharded-teacher": "sharded",
    "zero3-no-room-on-rank-1": "sharded",
}
"""Runs of ``on_ranks``, and the teacher's placement in each; ``speed-alone`` asks no questions."""


def on_ranks(folder: str, out: str) -> dict[str, Any]:
    """The same short run under DDP and under ZeRO-3, with a whole and with a sharded teacher, each with a report."""
    from ptl.strategies.deepspeed import ZeROStrategy

    found: dict[str, Any] = {}
    for name, placement in ON_RANKS.items():
        strategy: Any = "ddp" if name.startswith("ddp") else ZeROStrategy(stage=3)
        run = Path(out) / name
        task = "none" if "alone" in name else "exact"
        callback = report(Path(folder), task=task, baselines={"untrained twin": f"{folder}/student"})
        fit = trainer(run, [RunRecord(run), callback], strategy=strategy, devices=2, max_steps=2)
        full = "no-room" in name and rank() == 1
        with patch.object(partition, "free_bytes", lambda *_: 0) if full else nullcontext():
            fit.fit(distillation(Path(folder), placement=placement), chat(Path(folder)))
        if rank() == 0:
            found[name] = read(run)
    return found
