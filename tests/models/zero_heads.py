"""What a rank of ``test_heads`` runs: ZeRO-3 around a head that is read outside its module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ptl.models.heads import HeadLoss, causal_lm, lm_loss
from tests.models import zoo
from tests.ranks import start_deepspeed

STAGE_3 = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}
LR = 0.01
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "lora": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False},
    "copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}
CASES = [
    ("llama_tied", "none", "module"),
    ("llama_tied", "none", "step"),
    ("llama_tied", "rows", "module"),
    ("llama_untied", "none", "module"),
    ("llama_untied", "lora", "module"),
    ("llama_untied", "copy", "module"),
]
"""Model, adapter, and what the head is declared external to: the loss's own module, or the whole step."""


class Step(nn.Module):
    """Model and loss in one forward, the head's loss a module of its own where ``small``."""

    def __init__(self, model: nn.Module, small: bool) -> None:
        super().__init__()
        self.policy = model
        self.head_loss = HeadLoss(model) if small else None
        self.held = 0

    def forward(self, batch):
        total = lm_loss(self.policy, batch, head_loss=self.head_loss).fused.total
        self.held = causal_lm(self.policy).get_output_embeddings().state_dict(keep_vars=True).popitem()[1].numel()
        return total


def build(name: str, adapter: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model, options = zoo.make(name), ADAPTERS[adapter]
    torch.manual_seed(7)
    return model if options is None else get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **options)).train()


def batches():
    """Four steps; nothing is trained in the second."""
    out = [zoo.packed(zoo.documents(seed=seed)) for seed in range(4)]
    out[1] = out[1]._replace(loss_mask=torch.zeros_like(out[1].loss_mask))
    return out


def optimizer(model: nn.Module, lr: float = LR) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def plain(name: str, adapter: str, lr: float = LR) -> list[float]:
    """Losses of the four steps without DeepSpeed."""
    model = build(name, adapter)
    step, losses = optimizer(model, lr), []
    for batch in batches():
        loss = lm_loss(model, batch).fused.total
        loss.backward()
        step.step()
        step.zero_grad()
        losses.append(loss.item())
    return losses


def sharded() -> dict[str, Any]:
    """The same under ZeRO-3: losses, and elements of the head that are here at the end of forward and of the step."""
    import deepspeed

    start_deepspeed()
    results = {}
    for name, adapter, reader in CASES:
        module = Step(build(name, adapter), reader == "module")
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer(module), config=STAGE_3)
        for parameter in causal_lm(module.policy).get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(module.head_loss or module, parameter)
        losses, largest = [], 0
        for batch in batches():
            loss = engine(batch)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            largest = max(largest, *(p.numel() for p in module.parameters()))
        results[f"{name}-{adapter}-{reader}"] = {"losses": losses, "held": module.held, "largest_after": largest}
        engine.destroy()
    return results
