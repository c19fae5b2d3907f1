"""What rank processes do for the callbacks' tests."""

from __future__ import annotations

from typing import Any

from ptl.callbacks.checkpoint import Checkpoint, latest_checkpoint
from ptl.callbacks.health import DivergedError, Health
from ptl.callbacks.jsonl import read_metrics
from ptl.callbacks.throughput import Throughput
from tests.callbacks.parts import Toy, loader, packed, padded, trainer
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


def diverged(folder: str) -> dict[str, Any]:
    """One rank's loss becomes NaN at step 5, between two looks; both ranks stop, with the same words."""
    callbacks = [Health(every_n_steps=4), Checkpoint(every_n_train_steps=2)]
    fit = trainer(folder, callbacks, strategy="ddp", devices=2, max_steps=9)
    batches = [packed([8, 8], trained=4, seed=i) for i in range(9)]
    try:
        fit.fit(Toy(bad_step=5 if rank() == 1 else -1), loader(batches))
    except DivergedError as error:
        newest = latest_checkpoint(folder)
        return {"error": str(error), "newest": newest.name if newest else None}
    return {"error": None}
