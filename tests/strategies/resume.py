"""What rank processes run in the tests of checkpoints: saving, resuming, other numbers of ranks, being killed."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from ptl.strategies.deepspeed import ZeROStrategy
from tests import ranks
from tests.strategies.scenarios import CUT_ALL, Tiny, loader, save_state, trainer

MICRO_STEPS, ACCUMULATE = 5, 2
RUNS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2-bf16": {"stage": 2, "precision": "bf16-true"},
    "3-bf16": {"stage": 3, "precision": "bf16-true"},
    "2-lora": {"stage": 2, "lora": True},
    "3-lora": {"stage": 3, "lora": True},
    "3-qlora": {"stage": 3, "lora": True, "nf4": True},
    "3-offload": {"stage": 3, "offload_optimizer": True},
}


def run(
    folder: str,
    out: str,
    epochs: int,
    *,
    stage: Any,
    precision: str = "32-true",
    ckpt: str | None = None,
    **options: Any,
) -> tuple[Tiny, Any]:
    model = {key: options.pop(key) for key in ("lora", "nf4", "kind") if key in options}
    module = Tiny(folder, **{"kind": "adamw", "lr": 0.01, **model})
    offload, trust = options.pop("offload_optimizer", False), options.pop("trust", False)
    strategy = ZeROStrategy(stage=stage, offload_optimizer=offload, config=CUT_ALL, trust_checkpoint=trust)
    fit = trainer(strategy, out, precision=precision, accumulate_grad_batches=ACCUMULATE, max_epochs=epochs, **options)
    fit.fit(module, loader(MICRO_STEPS, ACCUMULATE), ckpt_path=ckpt)
    return module, fit


class SaveBetween(Callback):
    """Saves a checkpoint, and the weights beside it, when the first epoch is over."""

    def __init__(self, ckpt: str) -> None:
        self.ckpt, self.step = ckpt, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.ckpt)
            save_state(pl_module, Path(self.ckpt.removesuffix(".ckpt") + "-saved.pt"))
            self.step = trainer.global_step


def exact(folder: str, out: str, names: list[str]) -> dict[str, Any]:
    """Two epochs with a checkpoint between, and the second once more from there, on the same number of ranks."""
    results = {}
    for name in names:
        between = SaveBetween(f"{out}/{name}.ckpt")
        whole, _ = run(folder, out, 2, callbacks=[between], **RUNS[name])
        save_state(whole, Path(out) / f"{name}-whole.pt")
        second, resumed = run(folder, out, 2, ckpt=between.ckpt, **RUNS[name])
        save_state(second, Path(out) / f"{name}-resumed.pt")
        results[name] = {
            "whole": whole.losses,
            "resumed": second.losses,
            "steps": [between.step, resumed.global_step],
        }
    return results


def reshaped(folder: str, out: str, names: list[str], save: Sequence[str] = ()) -> dict[str, Any]:
    """Goes on from checkpoints that another number of ranks made; leaves some of its own under names to save."""
    results: dict[str, Any] = {}
    for name in names:
        module, _ = run(folder, out, 2, ckpt=f"{out}/{name}.ckpt", **RUNS[name])
        save_state(module, Path(out) / f"{name}-on-{ranks.world_size()}.pt")
        results[name] = {"losses": module.losses, "metric": _validate(folder, out, name)}
        if name in save:
            _, fit = run(folder, out, 1, **RUNS[name])
            fit.save_checkpoint(f"{out}/back/{name}.ckpt")
    return results


def _validate(folder: str, out: str, name: str) -> float:
    """The validation metric of a checkpoint, whatever the number of ranks that made it."""
    options = dict(RUNS[name])
    strategy = ZeROStrategy(stage=options.pop("stage"), config=CUT_ALL)
    fit = trainer(strategy, out, precision=options.pop("precision", "32-true"))
    options.pop("offload_optimizer", None)
    module = Tiny(folder, **options)
    return fit.validate(module, loader(2, 1, seed=5), ckpt_path=f"{out}/{name}.ckpt", verbose=False)[0]["val"]


def refusals(folder: str, out: str, foreign: str) -> dict[str, str]:
    """Checkpoints that must not be resumed, each with the message of every rank's error."""
    mistakes: dict[str, dict[str, Any]] = {
        "stage": {**RUNS["2"], "stage": 1, "ckpt": f"{out}/2.ckpt"},
        "precision": {**RUNS["2-bf16"], "precision": "32-true", "ckpt": f"{out}/2-bf16.ckpt"},
        "adapter": {**RUNS["2"], "ckpt": f"{out}/2-lora.ckpt"},
        "missing": {**RUNS["2"], "ckpt": f"{out}/none.ckpt"},
        "foreign": {**RUNS["2"], "ckpt": foreign},
    }
    results = {}
    for name, options in mistakes.items():
        try:
            run(folder, out, 2, **options)
            results[name] = "no error"
        except ValueError as error:
            results[name] = f"{type(error).__name__}: {error}"
    vouched, _ = run(folder, out, 2, ckpt=foreign, trust=True, **RUNS["2"])
    results["vouched"] = str(len(vouched.losses))
    _, fit = run(folder, out, 1, kind="sgd", **RUNS["2"])
    fit.save_checkpoint(f"{out}/sgd.ckpt")
    return results


def refused_conversion(folder: str, out: str) -> dict[str, str]:
    """An optimizer that DeepSpeed cannot cut anew."""
    try:
        run(folder, out, 2, kind="sgd", ckpt=f"{out}/sgd.ckpt", **RUNS["2"])
    except ValueError as error:
        return {"sgd": str(error)}
    return {"sgd": "no error"}


def saving(folder: str, out: str, names: list[str], foreign: str) -> dict[str, Any]:
    """``exact``, then what is refused of what it has saved, then the callback, in one start."""
    results: dict[str, Any] = {"exact": exact(folder, out, names)}
    if ranks.rank() == 0:
        shutil.copytree(f"{out}/2.ckpt", foreign)
    torch.distributed.barrier()
    return {**results, "refusals": refusals(folder, out, foreign), "callback": callback(folder, out)}


def other_ranks(folder: str, out: str, names: list[str], back: list[str]) -> dict[str, Any]:
    """On one rank: goes on from two ranks' checkpoints, saves some of its own, and meets one that it cannot take."""
    return {"reshaped": reshaped(folder, out, names, save=back), **refused_conversion(folder, out)}


def callback(folder: str, out: str) -> dict[str, Any]:
    """Lightning's own callback over ZeRO: it keeps two and a link, and removes the rest."""
    keep = ModelCheckpoint(
        dirpath=f"{out}/kept", filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max",
        save_last="link",
    )  # fmt: skip
    _, fit = run(folder, out, 2, stage=3, callbacks=[keep], enable_checkpointing=True)
    resumed, _ = run(folder, out, 3, stage=3, ckpt=f"{out}/kept/last.ckpt", trust=True)
    return {"steps": fit.global_step, "resumed_losses": len(resumed.losses)}


def killed(folder: str, out: str, stage: int, after: int) -> None:
    """Saves after every step until rank 0 is killed while it writes its ``after``-th checkpoint."""

    def watch() -> None:
        last = Path(out) / f".step={after}.ckpt.partial"
        while not any(last.rglob("*.pt")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    if ranks.rank() == 0:
        threading.Thread(target=watch, daemon=True).start()
    keep = ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run(folder, out, 50, stage=stage, callbacks=[keep], enable_checkpointing=True)


def goes_on(folder: str, out: str, stage: int, ckpt: str) -> dict[str, Any]:
    """Resumes what a killed run has left."""
    module, fit = run(folder, out, 2, stage=stage, ckpt=ckpt)
    save_state(module, Path(out) / "resumed.pt")
    return {"losses": module.losses, "steps": fit.global_step}
