"""What rank processes run in the tests of training: every stage and accumulation, and every kind of head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ptl.strategies.deepspeed import ZeROStrategy, consolidated_state_dict, full_shape, gathered
from tests.strategies.scenarios import CUT_ALL, Batch, Tiny, loader, save_state, trainer

NO_REUSE = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
}
"""Also nothing is gathered ahead of its use or kept for a second one, which a tiny model always would be."""


def parity(folder: str, out: str, micro_steps: int, epochs: int) -> dict[str, Any]:
    """Every stage with every accumulation: steps, engine steps, losses, norms; the weights go to files."""
    results = {}
    for stage in (0, 1, 2, 3):
        for accumulate in (2, 4):
            module = Tiny(folder)
            strategy = ZeROStrategy(stage=stage, config=CUT_ALL)
            fit = trainer(strategy, out, accumulate_grad_batches=accumulate, max_epochs=epochs)
            fit.fit(module, loader(micro_steps, accumulate))
            name = f"{stage}-{accumulate}"
            save_state(module, Path(out) / f"{name}.pt")
            results[name] = {
                "steps": fit.global_step,
                "engine_steps": strategy.deepspeed_engine.global_steps,
                "losses": module.losses,
                "norms": module.norms,
                "config": strategy.config,
            }
    return results


def training(folders: dict[str, str], out: str, micro_steps: int, epochs: int) -> dict[str, Any]:
    """Both of the above and below in one start."""
    return {"parity": parity(folders["tied"], out, micro_steps, epochs), "heads": heads(folders, out)}


class Watched(Tiny):
    """Also notes, at stage 3, what the parameters look like before, during and after a step."""

    def on_train_start(self) -> None:
        with gathered(self.policy):
            b = [p for name, p in self.policy.named_parameters() if "lora_B" in name]
            self.lora_b_is_zero = all(bool((p == 0).all()) and p.numel() > 0 for p in b)
        self.sizes_before = self._sizes()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.head_inside = self._head[0].numel()
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.seen.append({"head": self._head[0].numel(), "largest": max(self._sizes())})

    def _sizes(self) -> list[int]:
        return [p.numel() for p in self.policy.parameters()]


HEADS: dict[str, dict[str, Any]] = {
    "tied": {"folder": "tied"},
    "untied": {"folder": "untied"},
    "tied-lora": {"folder": "tied", "lora": True},
    "untied-lora": {"folder": "untied", "lora": True},
    "untied-frozen-head": {"folder": "untied", "freeze": "lm_head"},
    "untied-frozen-body": {"folder": "untied", "freeze": "layers"},
    "untied-nf4-lora": {"folder": "untied", "lora": True, "nf4": True},
    "tied-recompute": {"folder": "tied", "recompute": True},
    "untied-lora-recompute": {"folder": "untied", "lora": True, "recompute": True},
    "tied-fused": {"folder": "tied", "fused": True},
    "untied-fused": {"folder": "untied", "fused": True},
    "untied-lora-fused": {"folder": "untied", "lora": True, "fused": True},
    "tied-small": {"folder": "tied", "small": True},
    "untied-small": {"folder": "untied", "small": True},
    "untied-fused-small": {"folder": "untied", "fused": True, "small": True},
}


def model_options(name: str) -> dict[str, Any]:
    """Of a case's options, those of the model."""
    return {key: value for key, value in HEADS[name].items() if key not in ("folder", "fused", "small")}


def heads(folders: dict[str, str], out: str) -> dict[str, Any]:
    """Stage 3 with the head's weight read outside its module, in every combination of tying, LoRA and freezing."""
    results = {}
    for name, options in HEADS.items():
        options = dict(options)
        module = Watched(folders[options.pop("folder")], **options)
        strategy = ZeROStrategy(stage=3, config=NO_REUSE if module.loss else CUT_ALL)
        trainer(strategy, out, accumulate_grad_batches=2, max_epochs=2).fit(module, loader(4, 2))
        save_state(module, Path(out) / f"{name}.pt")
        results[name] = {
            "losses": module.losses,
            "norms": module.norms,
            "seen": module.seen,
            "sizes_before": max(module.sizes_before),
            "head_inside": module.head_inside,
            "head_size": full_shape(module.policy.get_output_embeddings().weight).numel(),  # type: ignore[operator,union-attr]
            "trainable_names": sorted(consolidated_state_dict(module.policy, trainable_only=True)),
            "held_before_loss": module.held_before_loss,
            "lora_b_is_zero": module.lora_b_is_zero,
        }
    return results
