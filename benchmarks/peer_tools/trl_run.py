"""A TRL trainer built on its ``SFTConfig``, run and measured: what its stages have in common."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.counts import Counts
from benchmarks.peer_tools.machine import StepClock, peak_memory


class Steps(TrainerCallback):
    """Marks the end of each optimizer step."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.mark()


class Counted(Trainer):
    """A trainer whose tokens and losses are written down; to be put in front of one of TRL's classes."""

    def __init__(self, counts: Counts, **kwargs: Any) -> None:
        self.counts = counts
        super().__init__(**kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        trained = (inputs["labels"][:, 1:] != -100).sum()
        self.counts.add(inputs["attention_mask"].sum(1), trained, inputs["input_ids"].numel())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.counts.add_loss(loss)
        return loss


def settings(spec: Mapping[str, Any], *, dtype: str, autocast: bool) -> dict[str, Any]:
    """What the configuration of every stage is given, beside where it writes.

    Arguments:
        spec: what both sides are told.
        dtype: of the trained weights, as torch names it.
        autocast: bf16 products on weights of ``dtype``.
    """
    return {
        "model_init_kwargs": {"dtype": dtype},
        "bf16": autocast,
        "per_device_train_batch_size": spec["trl_micro"],
        "gradient_accumulation_steps": spec["batch_rows"] // spec["trl_micro"],
        "gradient_checkpointing": spec["trl_checkpointing"],
        "use_liger_kernel": spec["trl_liger"],
        "max_steps": spec["steps"],
        "train_sampling_strategy": "sequential",
        "max_length": spec["max_length"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": spec["weight_decay"],
        "max_grad_norm": spec["clip"],
        "seed": spec["seed"],
    }


def read_lines(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows in their order."""
    return [json.loads(line) for line in Path(spec["rows"]).read_text(encoding="utf-8").splitlines()]


def train(
    spec: Mapping[str, Any],
    config: Callable[..., Any],
    given: Mapping[str, Any],
    make: Callable[[Counts, Any, list[TrainerCallback]], Any],
    *,
    teacher: str | None = None,
) -> Measured:
    """One measured run in this process.

    Arguments:
        spec: what both sides are told.
        config: the trainer's configuration class.
        given: its arguments; recorded.
        make: builds the trainer, a ``Counted``, from counts, configuration and callbacks.
        teacher: folder of a frozen model that every token also goes through.
    """
    device = spec["device"]
    clock, counts = StepClock(device), Counts(spec["batch_rows"] // spec["trl_micro"])
    start_bytes = peak_memory(device)
    arguments = config(
        output_dir=str(Path(spec["folder"]) / "trl"),
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        save_strategy="no",
        **copy.deepcopy(dict(given)),  # a trainer may change the dictionaries that it is given
    )
    trainer = make(counts, arguments, [Steps(clock)])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return counts.measured(clock, trainer.model, teacher=teacher, start_bytes=start_bytes, settings=dict(given))
