"""Optimizers and learning-rate schedules, as plain specs that a YAML can hold.

One optimizer over two or more parameter groups serves every objective, because DeepSpeed takes one. Matrices decay,
vectors (norms, biases) do not; with LoRA+ the B matrices have their own rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Which optimizer, with its rates.

    Attributes:
        kind: ``adamw`` (fused where every parameter's device has the kernel), ``adamw8bit`` (bitsandbytes, 8-bit
            moments), ``muon`` (for the hidden matrices, with AdamW for embeddings, heads, norms and biases; not under
            ZeRO and not for adapters), ``sgd`` (plain, for checks of gradients).
        lr: peak learning rate.
        weight_decay: decoupled decay of matrices; vectors are never decayed.
        betas: moment decay rates of the Adam family.
        eps: denominator's term of the Adam family.
    """

    kind: Literal["adamw", "adamw8bit", "muon", "sgd"] = "adamw"
    lr: float = 2e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr must be above 0, got {self.lr}")

    def build(
        self, module: nn.Module, *, lora_plus_ratio: float | None = None, fused: bool = True
    ) -> torch.optim.Optimizer:
        """The optimizer over ``module``'s trainable parameters.

        Arguments:
            module: what is trained.
            lora_plus_ratio: rate of LoRA's B matrices over ``lr`` (LoRA+, arXiv:2402.12354); None for one rate.
            fused: use AdamW's one-kernel step where the devices have it.

        Raises:
            ValueError: nothing is trainable, LoRA+ is asked of a model without LoRA matrices, or Muon of one without
                trainable hidden matrices.
        """
        import torch

        if self.kind == "muon":
            return self._muon(module, lora_plus_ratio)
        groups = parameter_groups(
            module.named_parameters(), self.lr, self.weight_decay, lora_plus_ratio=lora_plus_ratio
        )
        if self.kind == "sgd":
            return torch.optim.SGD(groups, lr=self.lr)
        if self.kind == "adamw8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        devices = {p.device.type for group in groups for p in group["params"]}
        fused = fused and devices <= {"cpu", "cuda"}
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)

    def _muon(self, module: nn.Module, lora_plus_ratio: float | None) -> torch.optim.Optimizer:
        from ptl.models.muon import MuonAdamW, hidden_matrices

        chosen = hidden_matrices(module)
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        hidden = [p for _, p in trained if id(p) in chosen]
        rest = [(name, p) for name, p in trained if id(p) not in chosen]
        if not hidden:
            raise ValueError(
                "model.init_args.optimizer.kind muon has no hidden matrix to train (an adapter's are not its kind): "
                "set it to adamw, or train the whole model without model.init_args.policy.adapter"
            )
        groups = parameter_groups(rest, self.lr, self.weight_decay, lora_plus_ratio=lora_plus_ratio) if rest else []
        matrices = [{"params": hidden, "lr": self.lr, "weight_decay": self.weight_decay}]
        return MuonAdamW(matrices, groups, lr=self.lr, betas=self.betas, eps=self.eps)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, *, lora_plus_ratio: float | None
) -> list[dict[str, Any]]:
    """Trainable parameters by (decayed or not, LoRA's B or not); empty groups are left out.

    The number of dimensions is read from ``ds_shape`` where ZeRO-3 has partitioned the parameter.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            is_b = lora_plus_ratio is not None and ("lora_B" in name or "lora_embedding_B" in name)
            groups.setdefault((len(shape) >= 2, is_b), []).append(parameter)
    if not groups:
        raise ValueError("no parameter is trainable: set model.policy.adapter, or drop model.policy.quantize")
    if lora_plus_ratio is not None and not any(is_b for _, is_b in groups):
        raise ValueError("LoRA+ needs LoRA matrices: the model has none")
    return [
        {
            "params": parameters,
            "lr": lr * (lora_plus_ratio if is_b and lora_plus_ratio else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (decays, is_b), parameters in sorted(groups.items(), reverse=True)
    ]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over a run: linear warm-up, then a shape.

    Attributes:
        kind: ``constant``, ``linear`` or ``cosine`` down to ``floor``, or ``wsd`` (constant, then linear over the last
            ``decay`` share).
        warmup: steps if 1 or more, else a share of all steps.
        floor: last rate over the peak.
        decay: share of steps that ``wsd`` decays over.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: float = 0.03
    floor: float = 0.1
    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ValueError(f"schedule.warmup must be 0 or more, got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"schedule.floor must be between 0 and 1, got {self.floor}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"schedule.decay must be above 0 and at most 1, got {self.decay}")

    def factor(self, step: int, total: int) -> float:
        """The rate's factor, in (0, 1], for the 0-based optimizer ``step`` of ``total``."""
        warmup = int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * total)
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "constant":
            return 1.0
        start = warmup if self.kind != "wsd" else max(warmup, total - math.ceil(self.decay * total))
        progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 - (1 - self.floor) * progress

    def build(self, optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
        """A torch scheduler stepped once an optimizer step."""
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, lambda step: self.factor(step, total))
