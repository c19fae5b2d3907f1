"""What processes do for the laws of rows that ranks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.objectives import law


def run(folder: str, out: str, cases: list[dict[str, Any]], resume: bool = False) -> dict[str, Any]:
    """The cases; and with ``resume`` the first step, a checkpoint and the rest, on two ranks that share rows."""
    result = law.run(folder, out, cases)
    if resume:
        result["begun"] = begin(folder, out)
        result["rest"] = go_on(folder, out, "shared", world_size=2, shared=2)
    return result


def begin(folder: str, out: str) -> dict[str, Any]:
    """One optimizer step of two micro-batches of four documents, each shared by both ranks."""
    from ptl.callbacks.throughput import Throughput

    objective, data = law.build(folder, micro=4, shared=2)
    trainer = law.trainer_of(folder, "ddp", 2, 2, max_steps=1, callbacks=[Throughput(warmup=0)])
    trainer.fit(objective, datamodule=data)
    trainer.save_checkpoint(f"{out}/one.ckpt")
    return data.state_dict()


def go_on(folder: str, out: str, name: str, *, world_size: int, shared: int) -> dict[str, Any]:
    """The rest of the epoch; weights are saved as ``OUT/<name>.npy``."""
    import os

    from ptl.callbacks.throughput import Throughput
    from ptl.strategies.deepspeed import consolidated_state_dict

    objective, data = law.build(folder, micro=4, shared=shared)
    meter = Throughput(warmup=0)
    trainer = law.trainer_of(folder, "ddp" if world_size > 1 else "auto", world_size, 2, callbacks=[meter])
    trainer.fit(objective, datamodule=data, ckpt_path=f"{out}/one.ckpt")
    assert trainer.global_step == law.STEPS
    if int(os.environ.get("RANK", "0")) == 0:
        np.save(Path(out) / f"{name}.npy", law.flat(consolidated_state_dict(objective.policy, trainable_only=True)))
    return {
        "loss": float(trainer.callback_metrics["train/loss"]),
        "tokens": meter.summary()["tokens_seen"],
        "all_tokens": sum(data.prepared_rows("train").rows["length"]),
        "position": data.state_dict(),
    }
