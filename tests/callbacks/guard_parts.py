"""What the tests of the step guard and of rewinds run, in this process and on ranks."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.guard import Spike
from ptl.callbacks.health import DivergedError, Health, RewindError
from ptl.callbacks.jsonl import read_metrics, read_rows
from ptl.callbacks.record import RunRecord
from ptl.callbacks.rewind import read_rewind
from ptl.callbacks.saved import latest_checkpoint
from ptl.callbacks.stragglers import Stragglers
from ptl.callbacks.throughput import token_batches
from ptl.strategies.deepspeed import ZeROStrategy, consolidated_state_dict
from tests.callbacks.parts import Toy, loader, packed, trainer
from tests.callbacks.real import chat, sft
from tests.ranks import rank


def numbered(count: int, first: int = 0) -> list:
    """Batches whose row numbers are their own."""
    return [
        packed([8, 8], trained=4, seed=i)._replace(rows=torch.tensor([2 * i, 2 * i + 1])) for i in range(first, count)
    ]


class Poison(L.Callback):
    """Multiplies the loss of some optimizer steps, on one rank or on all.

    Arguments:
        steps: from 1.
        factor: of the loss.
        on: the rank; None for all.
    """

    def __init__(self, steps: list[int], factor: float = float("nan"), on: int | None = None) -> None:
        self.steps, self.factor, self.on = steps, factor, on

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if trainer.global_step + 1 in self.steps and self.on in (None, trainer.global_rank):
            loss.mul_(self.factor)


class Rows(L.Callback):
    """Notes the row numbers of every optimizer step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rows = [n for b in token_batches(batch) if b.rows is not None for n in b.rows.tolist()]
        self.seen.setdefault(trainer.global_step + 1, []).extend(rows)


class Kinds(Toy):
    """A toy with the optimizer of a kind, of one group or of two."""

    def __init__(self, kind: str, *, groups: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.kind, self.groups = kind, groups

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters: list[Any] = list(self.parameters())
        if self.groups:
            parameters = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.0}]
        if self.kind == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.1, fused=self.kind == "fused")


def guarded(folder: str, model: str, data: str) -> dict[str, Any]:
    """All that two ranks show, in one start."""
    root = Path(folder)
    return {
        "diverged": diverged(root / "diverged"),
        "ddp": skipped(root / "ddp", "ddp"),
        **{f"zero{stage}": skipped(root / f"zero{stage}", stage) for stage in (0, 2, 3)},
        "spiked": {name: spiked(root / "spiked" / name, **how) for name, how in SPIKED.items()},
        "refused": refused(root / "refused"),
        "rewound": {
            name: rewound(root / "rewound" / name, Path(model), Path(data), **how) for name, how in REWOUND.items()
        },
        "slowed": slowed(root / "slowed"),
    }


def diverged(folder: Path) -> dict[str, Any]:
    """One rank's loss becomes NaN at step 5, between two looks; both ranks stop, with the same words."""
    callbacks = [Health(every_n_steps=4, max_skipped_in_a_row=1, max_rewinds=0), Checkpoint(every_n_train_steps=2)]
    fit = trainer(folder, callbacks, strategy="ddp", devices=2, max_steps=9)
    try:
        fit.fit(Toy(bad_step=5 if rank() == 1 else -1), loader(numbered(9)))
    except DivergedError as error:
        newest = latest_checkpoint(folder)
        return {"error": str(error), "newest": newest.name if newest else None}
    return {"error": None}


def skipped(folder: Path, kind: Any) -> dict[str, Any]:
    """One rank's loss is NaN at step 2 of 4: how the policy ends, and how it would without the data of that step."""
    out = {}
    for name, steps, callbacks in (("with", 4, [Poison([2], on=1)]), ("without", 3, [])):
        batches = [batch for i, batch in enumerate(numbered(4)) if steps == 4 or i != 1]
        module = Kinds("fused", lr=0.01)
        strategy: Any = kind if isinstance(kind, str) else ZeROStrategy(stage=kind)
        health = Health(every_n_steps=2)
        fit = trainer(folder / name, [*callbacks, health], strategy=strategy, devices=2, max_steps=steps)
        fit.fit(module, loader(batches))
        weights = consolidated_state_dict(module.policy)
        out[name] = float(sum(w.double().abs().sum() for w in weights.values())) if weights else None
        out[f"{name} step"] = fit.global_step
    path = folder / "with" / "skipped.jsonl"
    out["noted"] = read_rows(path) if rank() == 0 else None
    return out


SPIKED: dict[str, dict[str, Any]] = {
    "zero1 groups": {"stage": 1, "kind": "fused", "accumulate": 2, "groups": True},
    "zero2": {"stage": 2, "kind": "sgd"},
    "zero3": {"stage": 3, "kind": "fused", "accumulate": 2},
    "zero3 offloaded": {"stage": 3, "kind": "adamw", "offload": True, "groups": True},
    "zero0 bf16": {"stage": 0, "kind": "fused", "precision": "bf16-true"},
    "zero3 bf16": {"stage": 3, "kind": "sgd", "precision": "bf16-true"},
}
"""All but stage 0 in fp32, where the guard has the gradients before the step."""


def spiked(
    folder: Path,
    *,
    stage: Any,
    kind: str,
    accumulate: int = 1,
    offload: bool = False,
    groups: bool = False,
    precision: str = "32-true",
) -> dict[str, Any]:
    """One rank's loss is far too large at step 7 of 9: weights and moments at the end, and without that step's data."""
    out: dict[str, Any] = {}
    for name, steps in (("with", 9), ("without", 8)):
        batches = numbered(9 * accumulate)
        if name == "without":
            del batches[6 * accumulate : 7 * accumulate]
        strategy = ZeROStrategy(stage=stage, offload_optimizer=offload)
        poison = [Poison([7], factor=1000.0, on=1)] if name == "with" else []
        spike = Spike(least=6, window=16) if name == "with" else None
        options = {"accumulate_grad_batches": accumulate, "precision": precision, "max_steps": steps}
        module, health = Kinds(kind, groups=groups), Health(every_n_steps=4, spike=spike)
        fit = trainer(folder / name, [*poison, health], strategy=strategy, devices=2, gradient_clip_val=0.5, **options)
        fit.fit(module, loader(batches))
        assert strategy.engine is not None
        state = strategy.engine.basic_optimizer.state.values()
        whole = consolidated_state_dict(module.policy) or {}
        own = [_digest(module.policy.parameters()), _digest(v for values in state for v in values.values())]
        out[name] = [*own, _digest(whole.values())]
        out[f"{name} steps"] = [fit.global_step, strategy.skipped_steps()]
    for file, rows in (("skipped.jsonl", read_rows), ("metrics.jsonl", read_metrics)):
        out[file] = rows(folder / "with" / file) if rank() == 0 else None
    return out


def _digest(tensors: Iterable[Any]) -> str:
    found = sha256()
    for tensor in tensors:
        found.update(torch.as_tensor(tensor).detach().float().numpy().tobytes())
    return found.hexdigest()


def refused(folder: Path) -> str:
    """Spikes where DeepSpeed takes no norm."""
    strategy = ZeROStrategy(stage=2, config={"zero_optimization": {"compute_grad_norm": False}})
    try:
        fit = trainer(folder, [Health(spike=Spike())], strategy=strategy, devices=2, max_steps=1)
        fit.fit(Toy(), loader(numbered(1)))
    except ValueError as error:
        return str(error)
    return ""


REWOUND: dict[str, dict[str, Any]] = {
    f"zero{stage}{' spikes' * spikes}": {"stage": stage, "spikes": spikes}
    for stage, spikes in ((1, False), (2, True), (3, False), (3, True))
}
"""The stages whose checkpoints are folders, after losses that are not finite and after spikes."""


def rewound(folder: Path, model: Path, data: Path, *, stage: Any, spikes: bool) -> dict[str, Any]:
    """A rewind under ZeRO: what each attempt trained on, and the sum of the weights' sizes at its end."""
    factor, spike = (1e6, Spike(deviations=100, least=3, window=8)) if spikes else (float("nan"), None)
    out: dict[str, Any] = {}
    for name, poison in (("first", [5, 6]), ("second", [])):
        rows, health = Rows(), Health(max_skipped_in_a_row=2, spike=spike)
        callbacks = [Poison(poison, factor, on=1), rows, health, Checkpoint(save_top_k=-1, every_n_train_steps=1)]
        fit = trainer(
            folder,
            [*callbacks, RunRecord(folder)],
            strategy=ZeROStrategy(stage=stage),
            devices=2,
            max_steps=-1,
            max_epochs=4,
        )
        module, source = sft(model), chat(model, data)
        source.bind(view=module.view, tokenizer=None)
        try:
            fit.fit(module, source, ckpt_path=latest_checkpoint(folder))
        except RewindError as error:
            out["error"] = str(error)
        weights = consolidated_state_dict(module.policy)
        size = float(sum(w.double().abs().sum() for w in weights.values())) if weights else None
        out[name] = {"rows": rows.seen, "step": fit.global_step, "epoch": fit.current_epoch, "size": size}
    rewind = read_rewind(folder)
    out["rewind"] = [rewind.step, rewind.stopped] if rewind else None
    out["aside"] = sorted(path.name for path in (folder / "set-aside").iterdir())
    return out


def slowed(folder: Path) -> dict[str, Any]:
    """One rank takes longer for its forward pass; another run's rank waits for its data; two are alike."""
    out: dict[str, Any] = {}
    pause = (0.02, 0.3)[rank()]
    cases = {"forward": (Toy(pause=pause), 0.0), "data": (Toy(pause=0.02), pause), "alike": (Toy(pause=0.1), 0.0)}
    for name, (module, wait) in cases.items():
        callbacks = [Stragglers(every_n_steps=2, windows=3 if name == "alike" else 2)]
        options = {"strategy": "ddp", "devices": 2, "max_steps": 6, "accumulate_grad_batches": 2}
        fit = trainer(folder / name, callbacks, **options)
        fit.fit(module, loader(numbered(12), wait))
        if rank() == 0:
            path = folder / name / "stragglers.jsonl"
            rows = read_metrics(folder / name / "metrics.jsonl")
            key = "throughput/slowest_over_median"
            out[name] = {
                "ratios": {row["step"]: row[key] for row in rows if key in row},
                "named": read_rows(path) if path.exists() else [],
            }
    return out
