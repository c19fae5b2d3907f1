"""Answers to the same questions while the model learns."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ptl.callbacks.jsonl import read_rows
from ptl.callbacks.record import run_folder
from ptl.callbacks.redact import redact_tree
from ptl.callbacks.throughput import excluded, logged_step
from ptl.data.durable import append_line
from ptl.models.modes import evaluating
from ptl.rollout.sampling import greedy
from ptl.strategies.partition import gathered_forward
from ptl.types import Message

if TYPE_CHECKING:
    from ptl.data.render import Renderer

SAMPLES_FILE = "samples.jsonl"
SHOWN_CHARACTERS = 400
TABLE_ROWS = 500
"""Rows of the W&B table: the latest ones."""


class Samples(L.Callback):
    """Asks the policy fixed questions at the start, every ``every_n_steps`` and at the end, greedily.

    The answers are printed, appended to ``RUN/samples.jsonl`` and, with W&B, logged as a table. Training does not
    notice: random states, modes and the model's generation settings are as before. All ranks ask together; under
    ZeRO-3 the whole model is gathered on each device for it.

    Arguments:
        prompts: questions, each a conversation of its own.
        system: system message before each of them.
        every_n_steps: optimizer steps between askings; 0 for none between start and end.
        at_start: ask before the first step of a run.
        at_end: ask after the last.
        max_new_tokens: longest answer.
        console: show the answers on the terminal.

    Raises:
        ValueError: nothing to ask, or a number out of its range.
    """

    def __init__(
        self,
        prompts: list[str],
        *,
        system: str | None = None,
        every_n_steps: int = 0,
        at_start: bool = True,
        at_end: bool = True,
        max_new_tokens: int = 64,
        console: bool = True,
    ) -> None:
        if not prompts or not all(prompt.strip() for prompt in prompts):
            raise ValueError(f"Samples.prompts needs at least one question, and none empty, got {prompts!r}")
        if every_n_steps < 0:
            raise ValueError(f"Samples.every_n_steps must be 0 or more, got {every_n_steps}")
        if max_new_tokens < 1:
            raise ValueError(f"Samples.max_new_tokens must be 1 or more, got {max_new_tokens}")
        self.prompts = list(prompts)
        self.system = system
        self.every_n_steps = every_n_steps
        self.at_start = at_start
        self.at_end = at_end
        self.max_new_tokens = max_new_tokens
        self.console = console
        self._global_step = 0
        self._asked_at = -1
        self._rows: list[list[Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._global_step = trainer.global_step
        self._asked_at = -1
        if self.at_start and trainer.global_step == 0:
            self._ask(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step != self._global_step
        self._global_step = trainer.global_step
        if stepped and self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._ask(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end and self._asked_at != trainer.global_step:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked_at = trainer.global_step
        with excluded(trainer):
            answers = self._answers(trainer, pl_module)
            if trainer.is_global_zero:
                self._keep(trainer, answers)
            trainer.strategy.barrier("samples")

    def _answers(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        renderer = _renderer(trainer)
        policy = getattr(pl_module, "policy", None)
        if not isinstance(policy, nn.Module):
            raise ValueError(f"Samples needs a module with a policy, got {type(pl_module).__name__}")
        before = (Message(role="system", content=self.system),) if self.system else ()
        asked = [renderer.prompt((*before, Message(role="user", content=prompt))) for prompt in self.prompts]
        with (
            own_random_state(),
            gathered_forward(trainer.strategy),
            evaluating(policy),
            trainer.strategy.precision_plugin.val_step_context(),
        ):
            written = greedy(policy, asked, stop=renderer.terminators, max_new_tokens=self.max_new_tokens)
        rows = []
        for prompt, ids in zip(self.prompts, written, strict=True):
            ended = bool(ids) and ids[-1] in renderer.terminators
            text = str(renderer.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            rows.append({"prompt": prompt, "answer": text, "tokens": len(ids), "ended": ended})
        return rows

    def _keep(self, trainer: L.Trainer, answers: list[dict[str, Any]]) -> None:
        step = trainer.global_step
        path = run_folder(trainer) / SAMPLES_FILE
        answers = [redact_tree(answer) for answer in answers]
        for answer in answers:
            append_line(path, json.dumps({"step": step, **answer}, ensure_ascii=False))
        self._rows += [[step, answer["prompt"], answer["answer"]] for answer in answers]
        self._rows = self._rows[-TABLE_ROWS:]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", ["step", "prompt", "answer"], self._rows, step=logged_step(trainer))
        if self.console:
            first = {row["prompt"]: row["answer"] for row in read_rows(path) if row.get("step") == 0}
            Console().print(_table(step, answers, first if step else {}))


@contextmanager
def own_random_state(seed: int = 0) -> Iterator[None]:
    """Seeded inside, and every generator as it was afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _renderer(trainer: L.Trainer) -> Renderer:
    renderer = getattr(getattr(trainer, "datamodule", None), "renderer", None)
    if renderer is None:
        raise ValueError("Samples needs a data module with a renderer, such as ptl.data.module.ChatDataModule")
    return renderer


def _table(step: int, answers: list[dict[str, Any]], first: dict[str, str]) -> Table:
    """Questions and answers, beside those before training where there are any."""
    table = Table(title=f"samples, step {step}", show_lines=True, title_justify="left")
    table.add_column("question", ratio=2)
    if first:
        table.add_column("before training", ratio=3)
    table.add_column(f"step {step}" if first else "answer", ratio=3)
    for answer in answers:
        cells = [answer["prompt"], *([first.get(answer["prompt"], "")] if first else []), answer["answer"]]
        table.add_row(*(escape(_short(cell)) for cell in cells))
    return table


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
