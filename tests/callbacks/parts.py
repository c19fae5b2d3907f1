"""A small real module, data and trainer for the callbacks' tests; importable by rank processes."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from ptl.callbacks.jsonl import JsonlLogger
from ptl.types import TokenBatch
from tests import tiny


def packed(lengths: list[int], trained: int, *, seed: int = 0) -> TokenBatch:
    """Documents end to end; the last ``trained`` tokens carry loss."""
    total = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, total)
    mask[0, total - trained :] = 0.5
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return TokenBatch(
        input_ids=torch.randint(0, 300, (1, total), generator=generator),
        loss_mask=mask,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        document_ids=documents[None],
        sources=torch.zeros(len(lengths), dtype=torch.long),
        window_weight=torch.tensor(float(trained), dtype=torch.float64),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    )


def padded(lengths: list[int], trained: int, *, seed: int = 0) -> TokenBatch:
    """A document a row, padded to the longest; the first ``trained`` tokens but one of the longest carry loss."""
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    attention = torch.stack([(torch.arange(width) < n).long() for n in lengths])
    mask = torch.zeros(len(lengths), width)
    mask[lengths.index(width), 1 : 1 + trained] = 1
    return TokenBatch(
        input_ids=torch.randint(0, 300, (len(lengths), width), generator=generator) * attention,
        loss_mask=mask,
        position_ids=torch.arange(width).expand(len(lengths), width),
        document_ids=torch.where(attention > 0, torch.arange(len(lengths))[:, None], -1),
        sources=torch.zeros(len(lengths), dtype=torch.long),
        window_weight=torch.tensor(float(trained), dtype=torch.float64),
        attention_mask=attention,
    )


class Rows(Dataset):
    """Given batches, after a pause each."""

    def __init__(self, batches: list, pause: float = 0.0) -> None:
        self.batches = batches
        self.pause = pause

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int):
        time.sleep(self.pause)
        return self.batches[index]


def loader(batches: list, pause: float = 0.0) -> DataLoader:
    return DataLoader(Rows(batches, pause), batch_size=None, shuffle=False)


class Toy(L.LightningModule):
    """A tiny Llama trained on ``TokenBatch``; each step lasts at least ``pause`` seconds."""

    def __init__(
        self, *, pause: float = 0.0, val_pause: float = 0.0, dropout: float = 0.0, lr: float = 0.01, bad_step: int = -1
    ) -> None:
        super().__init__()
        self.policy = tiny.make_model(attention_dropout=dropout).train()
        self.pause, self.val_pause, self.lr, self.bad_step = pause, val_pause, lr, bad_step

    def loss(self, batch: TokenBatch) -> torch.Tensor:
        logits = self.policy(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch.input_ids[:, 1:].flatten(), reduction="none"
        )
        return (losses * batch.loss_mask[:, 1:].flatten()).sum() / batch.window_weight.float()

    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        loss = self.loss(batch)
        if self.trainer.global_step + 1 == self.bad_step:
            loss = loss * float("nan")
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        time.sleep(self.val_pause)
        self.log("val/loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def trainer(folder: Path | str, callbacks: list, **options) -> L.Trainer:
    """A quiet CPU trainer that logs into ``folder`` at every step."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": JsonlLogger(folder),
        "callbacks": callbacks,
        "default_root_dir": folder,
        "max_steps": 6,
        "max_epochs": -1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(hasattr(c, "best_model_path") for c in callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**{**defaults, **options})
