"""What rank processes do for the callbacks' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.export import Export
from ptl.callbacks.health import Health
from ptl.callbacks.jsonl import read_metrics
from ptl.callbacks.record import RunRecord
from ptl.callbacks.samples import Samples
from ptl.callbacks.saved import latest_checkpoint
from ptl.callbacks.shape import model_shape, parameter_counts
from ptl.callbacks.throughput import Throughput
from ptl.functional.flops import Work, training_flops
from ptl.models.modes import evaluating
from ptl.models.spec import LoRA
from ptl.strategies.deepspeed import ZeROStrategy, gathered_forward
from tests.callbacks.parts import Toy, loader, packed, padded, trainer
from tests.callbacks.real import QUESTIONS, chat, sft
from tests.ranks import rank

STEPS, ACCUMULATE, WARMUP = 7, 2, 1
PAUSES = (0.02, 0.05)


def batches_of(index: int) -> list:
    """Batches of one rank: packed and padded ones, of other sizes on each rank."""
    return [
        packed([5 + i, 9 + index, 4], trained=3 + index, seed=i) if i % 2 else padded([12 + i, 6, 3 + index], trained=4)
        for i in range(STEPS * ACCUMULATE)
    ]


def throughput(folder: str) -> dict[str, Any]:
    """Two ranks of unequal speed and unequal batches; a resume carries the tokens on."""
    index = rank()
    meter = Throughput(every_n_steps=2, warmup=WARMUP)
    fit = trainer(
        folder,
        [meter, Checkpoint(every_n_train_steps=3)],
        strategy="ddp",
        devices=2,
        max_steps=STEPS,
        accumulate_grad_batches=ACCUMULATE,
    )
    fit.fit(Toy(pause=PAUSES[index]), loader(batches_of(index)))
    first = {"summary": meter.summary(), "peak": meter._peak}

    again = Throughput(every_n_steps=2, warmup=WARMUP)
    fit = trainer(
        folder,
        [again, Checkpoint(every_n_train_steps=3)],
        strategy="ddp",
        devices=2,
        max_steps=STEPS + 3,
        accumulate_grad_batches=ACCUMULATE,
    )
    fit.fit(Toy(), loader(batches_of(index)), ckpt_path=latest_checkpoint(folder))
    rows = read_metrics(fit.loggers[0].path) if index == 0 else []  # pyright: ignore
    return {**first, "rows": rows, "seen": again.summary()["tokens_seen"]}


def zero3(folder: str, model: str, data: str) -> dict[str, Any]:
    """SFT under ZeRO-3 with every callback, without the ones that generate, and under DDP; whole and with LoRA."""
    return {
        f"{kind}{suffix}": _sft_run(Path(folder) / f"{kind}{suffix}", Path(model), Path(data), kind, suffix)
        for kind in ("full", "lora")
        for suffix in ("", "-silent", "-alone")
    }


def _sft_run(folder: Path, model: Path, data: Path, kind: str, suffix: str) -> dict[str, Any]:
    record, meter, checkpoint = RunRecord(folder), Throughput(warmup=1), Checkpoint()
    callbacks: list[Any] = [record, meter, Health(), checkpoint]
    if not suffix:
        callbacks += [Samples(QUESTIONS, every_n_steps=2, max_new_tokens=6, console=False), Export(console=False)]
    module = sft(model, lora=LoRA(rank=4) if kind == "lora" else None)
    strategy: Any = "ddp" if suffix == "-alone" else ZeROStrategy(stage=3)
    fit = trainer(folder, callbacks, strategy=strategy, devices=2, max_steps=4)
    look = Look()
    fit.callbacks.append(look)  # pyright: ignore[reportAttributeAccessIssue]
    fit.fit(module, chat(model, data))
    if rank():
        return {}
    rows = read_metrics(folder / "metrics.jsonl")
    newest = latest_checkpoint(folder)
    return {
        "losses": [row["train/loss"] for row in rows if "train/loss" in row],
        "norms": [row["health/grad_norm"] for row in rows if "health/grad_norm" in row],
        "skipped": sum(row.get("health/skipped_steps", 0) for row in rows),
        "measured": meter.summary()["measured_steps"],
        "tokens_seen": meter.summary()["tokens_seen"],
        "newest": newest.name if newest else None,
        "mean": look.mean,
        "argmax": look.argmax,
        "parameters": look.parameters,
        "flops": look.flops,
    }


class Look(Callback):
    """What the trained policy says, and its size, while its strategy still holds it."""

    mean = argmax = flops = 0.0
    parameters: tuple[int, int] = (0, 0)

    def on_train_end(self, trainer, pl_module):
        self.parameters = parameter_counts(pl_module.policy)
        self.flops = training_flops(model_shape(pl_module.policy), Work(100, 50, 1000))
        with gathered_forward(trainer.strategy), evaluating(pl_module.policy), torch.no_grad():
            logits = pl_module.policy(input_ids=torch.arange(3, 40)[None]).logits
        self.mean, self.argmax = float(logits.double().mean()), float(logits[0, -1].argmax())
