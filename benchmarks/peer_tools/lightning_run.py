"""``ptl fit`` on conversations as a recipe sets it up, without the run folder: data, trainer and measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.peer_tools.breakdown import breakdown
from benchmarks.peer_tools.compare import Measured
from benchmarks.peer_tools.counts import Counts
from benchmarks.peer_tools.machine import StepClock, peak_memory
from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation
from ptl.data.sources import Source
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import Dtype
from ptl.objectives.base import Objective
from ptl.strategies.cpu_products import fast_bf16

WorkOf = Callable[[Any], tuple[Tensor, Tensor, int]]
"""Lengths of a micro-batch's documents, its trained tokens, and the tokens that go through the model."""


def work_of_tokens(batch: Any) -> tuple[Tensor, Tensor, int]:
    """The work of a ``TokenBatch``."""
    lengths = torch.bincount(batch.document_ids[batch.document_ids >= 0])
    return lengths, (batch.loss_mask != 0).sum(), batch.input_ids.numel()


class Steps(L.Callback):
    """Writes down tokens and losses, marks the end of each optimizer step, and profiles the steps after warm-up.

    Arguments:
        clock: is marked.
        counts: are added to.
        profile_after: steps before the profile starts; None for no profile.
        work_of: counts a batch.
    """

    def __init__(self, clock: StepClock, counts: Counts, profile_after: int | None, work_of: WorkOf) -> None:
        self.clock, self.counts, self.profile_after, self.work_of = clock, counts, profile_after, work_of
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.clock.start()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.counts.add(*self.work_of(batch))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.add_loss(outputs["loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.clock.mark()
            if len(self.clock.seconds) == self.profile_after:
                self.profiler.start()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.profile_after is not None:
            self.profiler.stop()

    def profile(self) -> dict[str, Any]:
        """Shares of the profiled steps' time; empty where nothing was profiled."""
        if self.profile_after is None:
            return {}
        return {"profile": breakdown(self.profiler.events() or [], sum(self.clock.seconds[self.profile_after :]))}


def rates_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizer and schedule of an objective; the rates that TRL's defaults have are written out."""
    return {
        "optimizer": Optimizer(lr=spec["lr"], betas=(0.9, 0.999), weight_decay=spec["weight_decay"]),
        "schedule": Schedule(kind="constant", warmup=0),
    }


def weights_of(spec: Mapping[str, Any]) -> Dtype:
    """``ModelSpec.dtype``: under autocast (``bf16-mixed``) the weights stay fp32."""
    return "bf16" if spec["dtype"] == "bf16" else "fp32"


def model_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What every model of a run has in common."""
    recomputed = spec.get("checkpointing", False)
    return {"dtype": weights_of(spec), "compile": spec.get("compile", False), "gradient_checkpointing": recomputed}


def data_of(spec: Mapping[str, Any], folder: Path) -> ChatDataModule:
    """The rows in their order, each step's dealt to its micro-batches."""
    return ChatDataModule(
        [Source(path=spec["rows"], format=spec.get("format", "messages"))],
        max_length=spec["max_length"],
        layout=spec["layout"],
        micro_batch_size=spec["micro"],
        shuffle=False,
        preparation=Preparation(cache_dir=str(folder / "cache")),
    )


def fit(
    spec: Mapping[str, Any],
    objective: Objective,
    *,
    settings: Mapping[str, Any],
    teacher: str | None = None,
    work_of: WorkOf = work_of_tokens,
) -> Measured:
    """One measured run in this process.

    Arguments:
        spec: what both sides are told.
        objective: is trained; its models are not built yet.
        settings: of this stage, recorded beside those of every stage.
        teacher: folder of a frozen model that every token also goes through.
        work_of: counts a batch.
    """
    device, accumulate = spec["device"], spec["batch_rows"] // spec["micro"]
    clock, counts = StepClock(device), Counts(accumulate)
    start_bytes = peak_memory(device)
    L.seed_everything(spec["seed"], verbose=False)
    folder = Path(spec["folder"]) / "ptl"
    data = data_of(spec, folder)
    data.bind(view=objective.view, tokenizer=objective.spec.name)
    steps = Steps(clock, counts, spec["warmup"] if spec["profile"] else None, work_of)
    trainer = L.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if spec["dtype"] == "bf16-mixed" else "32-true",
        max_steps=spec["steps"],
        accumulate_grad_batches=accumulate,
        gradient_clip_val=spec["clip"] or None,
        callbacks=[steps],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=10,
        default_root_dir=str(folder),
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with fast_bf16() if device == "cpu" and spec["dtype"] != "fp32" else contextlib.nullcontext():  # as `ptl fit`
        trainer.fit(objective, data)
    shared = {
        "precision": str(trainer.precision),
        "dtype": objective.spec.dtype,
        "compile": objective.spec.compile,
        "gradient_checkpointing": objective.spec.gradient_checkpointing,
        "layout": spec["layout"],
        "micro_batch_size": spec["micro"],
        "accumulate_grad_batches": accumulate,
    }
    return counts.measured(
        clock,
        objective.policy,
        teacher=teacher,
        start_bytes=start_bytes,
        settings={**shared, **settings, **steps.profile()},
    )
