"""What rank processes run in the tests of precision, clipping, skipping, evaluation, generation and offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptl.strategies.deepspeed import ZeROStrategy, adamw_class, consolidated_state_dict, gathered_forward
from tests import ranks
from tests.strategies.scenarios import CUT_ALL, Batch, Tiny, batches, build, loader, save_state, token_sum, trainer


class Half(Tiny):
    """Notes dtypes; a batch of the given number, if any, has a loss that is not finite."""

    bad: tuple[int, ...] = ()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        names = ("inv_freq", "original_inv_freq")
        self.buffers = {name: b.clone() for name, b in self.policy.named_buffers() if name.endswith(names)}
        self.dtypes = [str(batch.mask.dtype), str(next(self.policy.parameters()).dtype)]
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if batch_idx in self.bad else loss


BF16 = [*(("bf16-true", stage) for stage in (0, 1, 2, 3)), ("bf16-mixed", 0), ("bf16-mixed", 3)]
CLIPPED = [*(("trainer", stage) for stage in (0, 1, 2, 3)), ("config", 2), ("config", 3)]


def precision(folder: str, out: str) -> dict[str, Any]:
    """bf16 at every stage, and what DeepSpeed skips."""
    results: dict[str, Any] = {}
    for name, stage in BF16:
        module = Half(folder)
        strategy = ZeROStrategy(stage=stage, config=CUT_ALL)
        fit = trainer(strategy, out, precision=name, accumulate_grad_batches=4, max_epochs=1)
        fit.fit(module, loader(8, 4))
        save_state(module, Path(out) / f"{name}-{stage}.pt")
        torch.save(module.buffers, Path(out) / f"{name}-{stage}-buffers.pt")
        results[f"{name}-{stage}"] = {
            "dtypes": module.dtypes,
            "losses": module.losses,
            "norms": module.norms,
            "plugin": type(fit.precision_plugin).__name__,
            "precision": fit.precision,
        }
    for stage in (2, 3):
        module = Half(folder)
        config = {**CUT_ALL, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        fit = trainer(ZeROStrategy(stage=stage, config=config), out, accumulate_grad_batches=4, max_epochs=1)
        fit.fit(module, loader(8, 4))
        results[f"autocast-{stage}"] = {"dtypes": module.dtypes, "losses": module.losses, "norms": module.norms}
    results["skipped"] = {stage: _skipped(folder, out, stage) for stage in (1, 3)}
    return results


def _skipped(folder: str, out: str, stage: Any) -> dict[str, Any]:
    module = Half(folder)
    module.bad = (1, 2)
    strategy = ZeROStrategy(stage=stage, config=CUT_ALL)
    fit = trainer(strategy, out, precision="bf16-true", max_epochs=1)
    fit.fit(module, loader(4, 1))
    weights = [bool(tensor.isfinite().all()) for tensor in consolidated_state_dict(module.policy).values()]
    result: dict[str, Any] = {"skipped": strategy.skipped_steps(), "steps": fit.global_step, "finite": all(weights)}
    module = Half(folder)
    module.bad = (1, 2)
    limited = ZeROStrategy(stage=stage, config=CUT_ALL, max_skipped_steps=2)
    try:
        trainer(limited, out, precision="bf16-true", max_epochs=1).fit(module, loader(4, 1))
    except RuntimeError as error:
        result["stopped"] = str(error)
    return result


def clipping(folder: str, out: str, limit: float) -> dict[str, Any]:
    """Clipping by the trainer's value and by the config's."""
    results = {}
    for source, stage in CLIPPED:
        config = {**CUT_ALL, **({"gradient_clipping": limit} if source == "config" else {})}
        options = {"gradient_clip_val": limit} if source == "trainer" else {}
        module = Tiny(folder)
        strategy = ZeROStrategy(stage=stage, config=config)
        trainer(strategy, out, accumulate_grad_batches=2, max_epochs=1, **options).fit(module, loader(4, 2))
        save_state(module, Path(out) / f"{source}-{stage}.pt")
        results[f"{source}-{stage}"] = {"norms": module.norms}
    return results


def _count_calls(module: Tiny) -> list[int]:
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1

    module.policy.get_input_embeddings().register_forward_hook(hook)  # type: ignore[operator,union-attr]
    return calls


def evaluation(folder: str, out: str) -> dict[str, Any]:
    """fit, validate, test and fit again with one trainer, then validation of a new module by a new trainer."""
    results = {}
    for stage in (2, 3):
        module = Tiny(folder)
        strategy = ZeROStrategy(stage=stage, config=CUT_ALL)
        fit = trainer(strategy, out, max_epochs=1)
        fit.fit(module, loader(2, 1))
        calls = _count_calls(module)
        first = fit.validate(module, loader(2, 1, seed=5), verbose=False)[0]["val"]
        second = fit.test(module, loader(2, 1, seed=5), verbose=False)[0]["val"]
        calls_in_evaluation = calls[0]
        fit.fit_loop.max_epochs = 2
        fit.fit(module, loader(2, 1))
        save_state(module, Path(out) / f"fit-{stage}.pt")
        alone = trainer(ZeROStrategy(stage=stage, config=CUT_ALL), out)
        fresh = alone.validate(Tiny(folder), loader(2, 1, seed=5), verbose=False)[0]["val"]
        results[str(stage)] = {
            "val": first,
            "test": second,
            "fresh": fresh,
            "losses": module.losses,
            "calls_in_evaluation": calls_in_evaluation,
            "calls": calls[0],
        }
    return results


def resized(folder: str, out: str) -> dict[str, Any]:
    """New embedding rows under stage 3, then a step of rate 0."""
    module = Tiny(folder, rows=ROWS, lr=0.0)
    trainer(ZeROStrategy(stage=3, config=CUT_ALL), out, max_steps=1).fit(module, loader(1, 1))
    save_state(module, Path(out) / "resized.pt")
    return {"losses": module.losses}


ROWS = 372
"""Embedding rows of ``resized``, six more than the model has."""


class Generates(Tiny):
    """Between steps every rank runs its own number of forward passes, rank 0 none at first."""

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        with gathered_forward(self.trainer.strategy), torch.no_grad():
            self.policy.eval()
            for _ in range((batch_idx + 1) * ranks.rank() + batch_idx):
                out = self.policy.generate(batch.ids[:1, :4], max_new_tokens=3, do_sample=False, synced_gpus=False)  # type: ignore[operator]
                self.seen.append({"tokens": out.tolist()})
            self.policy.train()
        self.sizes = max(p.numel() for p in self.policy.parameters())


def generation(folder: str, out: str) -> dict[str, Any]:
    """Generating between steps changes nothing in training, at stage 2 and 3, also when it fails."""
    results = {}
    for stage in (2, 3):
        module = Generates(folder)
        strategy = ZeROStrategy(stage=stage, config=CUT_ALL)
        trainer(strategy, out, max_epochs=2).fit(module, loader(4, 1))
        results[str(stage)] = {"losses": module.losses, "tokens": module.seen, "size_after": module.sizes}
    results["failing"] = _generation_that_fails(folder, out)
    return results


def _generation_that_fails(folder: str, out: str) -> list[float]:
    class Fails(Tiny):
        def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
            super().on_train_batch_end(outputs, batch, batch_idx)
            try:
                with gathered_forward(self.trainer.strategy):
                    raise KeyError("a user's mistake")
            except KeyError:
                pass

    module = Fails(folder)
    trainer(ZeROStrategy(stage=3, config=CUT_ALL), out, max_epochs=1).fit(module, loader(4, 1))
    return module.losses


class Offloaded(Tiny):
    """AdamW of DeepSpeed where the strategy offers it, or torch's."""

    def configure_optimizers(self) -> Any:
        kind = torch.optim.AdamW if self.kind == "torch" else adamw_class(self.trainer.strategy)
        return kind([p for p in self.parameters() if p.requires_grad], **ADAMW)


ADAMW: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
OFFLOAD: dict[str, dict[str, Any]] = {
    "2": {"stage": 2, "offload_optimizer": True},
    "3": {"stage": 3, "offload_optimizer": True},
    "3-parameters": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "3-hpz": {"stage": 3, "hpz_partition_size": 2},
}


def offload(folder: str, out: str) -> dict[str, Any]:
    """Offload with DeepSpeed's AdamW and with torch's, and ZeRO++ shards inside a node."""
    results = {}
    for name, options in OFFLOAD.items():
        # DeepSpeed makes the groups of hpz once in a process, so that case runs once.
        for kind in ("best", "torch") if "offload_optimizer" in options else ("torch",):
            module = Offloaded(folder, kind=kind)
            strategy = ZeROStrategy(**options, config=CUT_ALL)
            trainer(strategy, out, accumulate_grad_batches=2, max_epochs=1).fit(module, loader(6, 2))
            save_state(module, Path(out) / f"{name}-{kind}.pt")
            optimizer = strategy.deepspeed_engine.basic_optimizer
            secondary = [getattr(p, "ds_secondary_tensor", None) is not None for p in module.policy.parameters()]
            results[f"{name}-{kind}"] = {
                "losses": module.losses,
                "optimizer": type(optimizer).__name__,
                "second_copy": all(secondary),
            }
    return results


def reference_adamw(folder: str) -> tuple[nn.Module, list[float]]:
    """What ``offload`` must equal."""
    policy = build(folder)
    head = policy.get_output_embeddings().weight  # type: ignore[operator,union-attr]
    optimizer = torch.optim.AdamW(policy.parameters(), **ADAMW)
    losses = []
    data = batches(6, 2)
    for start in range(0, 6, 2):
        optimizer.zero_grad()
        total = sum(token_sum(policy, head, batch) / batch.window_weight for batch in data[start : start + 2])
        total.backward()
        losses.append(float(total.detach()))
        optimizer.step()
    return policy, losses


def life(folder: str, out: str, limit: float) -> dict[str, Any]:
    """All of the above in one start."""
    folders = {name: Path(out) / name for name in ("precision", "clipping", "evaluation", "generation", "offload")}
    for path in folders.values():
        path.mkdir(exist_ok=True)
    return {
        "precision": precision(folder, str(folders["precision"])),
        "clipping": clipping(folder, str(folders["clipping"]), limit),
        "evaluation": evaluation(folder, str(folders["evaluation"])),
        "resized": resized(folder, out),
        "generation": generation(folder, str(folders["generation"])),
        "offload": offload(folder, str(folders["offload"])),
    }
