"""Conversations on disk, and a LightningModule that notes what it was given, for tests of the data module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation
from ptl.data.sources import Source
from ptl.types import TokenBatch

Document = tuple[int, ...]


def write_chats(path: Path, count: int, start: int = 0) -> Path:
    """``count`` different conversations of one to six answer words."""
    with path.open("w") as file:
        for i in range(start, start + count):
            answer = "answer " * (i % 6 + 1) + str(i)
            messages = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def data_module(path: Path, model: Path, **settings: Any) -> ChatDataModule:
    """A data module over one file, with the model's tokenizer, its cache beside the file."""
    options = {
        "train": [Source(path=str(path))],
        "tokenizer": str(model),
        "preparation": Preparation(cache_dir=str(path.parent / "cache"), num_proc=1),
    }
    return ChatDataModule(**{**options, **settings})


def documents_of(batch: TokenBatch) -> list[Document]:
    """The documents of a batch that carry loss weight, by their tokens."""
    ids, mask, owner = batch.input_ids.flatten(), batch.loss_mask.flatten(), batch.document_ids.flatten()
    parts = [owner == document for document in range(len(batch.sources))]
    return [tuple(ids[part].tolist()) for part in parts if mask[part].sum() > 0]


class Crash(Exception):  # noqa: N818
    """Stands for the death of a run."""


class Recorder(L.LightningModule):
    """Notes the documents of each optimizer step, and that their weights add up to the window's.

    Args:
        crash_at: micro-batch, counted in this process, in which it raises ``Crash``.
        early: read ``estimated_stepping_batches`` while the optimizer is made.
    """

    def __init__(self, crash_at: int | None = None, early: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.crash_at, self.early, self.batches = crash_at, early, 0
        self.steps: list[list[Document]] = []
        self.window: list[TokenBatch] = []
        self.validated: list[Document] = []

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        if self.batches == self.crash_at:
            raise Crash
        self.batches += 1
        self.window.append(batch)
        return self.weight * 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        assert len({batch.window_weight.item() for batch in self.window}) == 1
        if self.trainer.world_size == 1:
            total = sum(batch.loss_mask.sum().item() for batch in self.window)
            assert abs(total - self.window[0].window_weight.item()) < 1e-6
        self.steps.append(sorted(document for batch in self.window for document in documents_of(batch)))
        self.window = []

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.validated += documents_of(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.early:
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 0.1)


def make_trainer(folder: Path, **settings: Any) -> L.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": bool(settings.get("callbacks")),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": str(folder),
    }
    return L.Trainer(**{**quiet, **settings})


def fit(trainer: L.Trainer, model: Recorder, data: ChatDataModule, checkpoint: Path | None = None) -> Recorder:
    """Fits, and takes a ``Crash`` as the end of it."""
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=False)
    except Crash:
        assert model.crash_at is not None
    return model
