"""Answers to the same questions while the model learns."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
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
from transformers import GenerationConfig

from ptl.callbacks.durable import append_line
from ptl.callbacks.jsonl import read_rows
from ptl.callbacks.record import run_folder
from ptl.callbacks.redact import redact_tree
from ptl.callbacks.throughput import excluded, logged_step
from ptl.models.adapters import base_model
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


def greedy(
    policy: nn.Module, prompts: Sequence[Sequence[int]], *, stop: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """The likeliest next token, again and again: every setting is this function's, none the checkpoint's.

    Arguments:
        policy: a Hugging Face model in eval mode, plain or adapted.
        prompts: token ids of each prompt.
        stop: ids that end an answer.
        max_new_tokens: longest answer.

    Returns:
        The ids of each answer, with the one that ended it.
    """
    model: Any = base_model(policy)
    device = model.get_input_embeddings().weight.device
    longest = max(len(prompt) for prompt in prompts)
    pad = stop[0] if stop else 0
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    with own_generation_settings(model), torch.no_grad():
        # The parameters are whole here, so ranks need not keep in step.
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)
    return [_until_stop(row[longest:].tolist(), stop) for row in out]


def _until_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
    return ids[:end]


@contextmanager
def evaluating(policy: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards each in the mode that it was in: a frozen part stays in eval mode."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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


@contextmanager
def own_generation_settings(model: Any) -> Iterator[None]:
    """The model's generation configuration is empty inside: what a caller leaves unset is not taken from a checkpoint.

    ``generate`` fills the unset fields of the configuration that it is given from the model's own, and published models
    carry repetition penalties and suppressed tokens there.
    """
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


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
