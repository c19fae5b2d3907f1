"""The model, data and trainer of the tests of ptl.strategies, and the plain training of one process to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from ptl.functional.cross_entropy import fused_linear_cross_entropy
from ptl.strategies.deepspeed import (
    ZeROStrategy,
    adamw_class,
    consolidated_state_dict,
    share_parameters,
)
from tests import ranks

VOCAB = 250
LR = 0.05
ROWS = 2
"""Rows of a micro-batch over all ranks; one rank takes both, two ranks take one each."""
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Without it DeepSpeed leaves the parameters of a tiny model whole."""


class Batch(NamedTuple):
    ids: Tensor
    mask: Tensor
    window_weight: Tensor


def batches(micro_steps: int, accumulate: int, *, rank: int = 0, world: int = 1, seed: int = 0) -> list[Batch]:
    """An epoch of micro-batches of uneven weight; the last window is shorter where the numbers do not divide."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (micro_steps, ROWS, 12), generator=rng)
    mask = torch.rand(micro_steps, ROWS, 12, generator=rng).round_() * torch.rand(micro_steps, ROWS, 12, generator=rng)
    mask[..., 0] = 0.0
    out = []
    for step in range(micro_steps):
        start = step // accumulate * accumulate
        weight = mask[start : start + accumulate].double().sum()
        out.append(Batch(ids[step, rank::world], mask[step, rank::world], weight))
    return out


def build(
    folder: str,
    *,
    lora: bool = False,
    freeze: str | None = None,
    nf4: bool = False,
    recompute: bool = False,
    rows: int | None = None,
) -> nn.Module:
    """A folder's model in train mode.

    With a LoRA adapter, parameters frozen whose name holds a word, weights quantised, activations computed again in
    the backward pass, or another number of embedding rows.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if freeze is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(freeze not in name)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(7)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(model, config)
    return model.train()


def token_sum(model: nn.Module, head: Tensor, batch: Batch, *, fused: bool = False) -> Tensor:
    """Weighted sum of token losses, the head's weight read outside its module, plainly or by the fused loss."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    hidden = inner.model(input_ids=batch.ids).last_hidden_state  # type: ignore[operator]
    if fused:
        rows = hidden[:, :-1].flatten(0, 1)
        return fused_linear_cross_entropy(rows, head, batch.ids[:, 1:].flatten(), batch.mask[:, 1:].flatten()).total
    logits = torch.nn.functional.linear(hidden[:, :-1], head).float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    return (losses * batch.mask[:, 1:]).sum()


def reference(
    folder: str, *, micro_steps: int, accumulate: int, epochs: int, clip: float = float("inf"), **model: Any
) -> tuple[nn.Module, list[float], list[float]]:
    """Plain SGD of one process: the model, and loss and gradient norm of every optimizer step."""
    policy = build(folder, **model)
    head = policy.get_output_embeddings().weight  # type: ignore[operator,union-attr]
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=LR)
    losses, norms = [], []
    data = batches(micro_steps, accumulate)
    for _ in range(epochs):
        for start in range(0, micro_steps, accumulate):
            optimizer.zero_grad()
            total = 0.0
            for batch in data[start : start + accumulate]:
                loss = token_sum(policy, head, batch) / batch.window_weight
                loss.backward()
                total += loss.item()
            norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), clip).item())
            losses.append(total)
            optimizer.step()
    return policy, losses, norms


def evaluate(model: nn.Module) -> float:
    """What ``validation_step`` logs over two micro-batches of other data: the mean of their sums."""
    head = model.get_output_embeddings().weight  # type: ignore[operator,union-attr]
    with torch.no_grad():
        return float(sum(token_sum(model, head, batch) for batch in batches(2, 1, seed=5)) / 2)


def relative_error(got: dict[str, Tensor], model: nn.Module, start: nn.Module) -> float:
    """Error of the whole update over its size."""
    first, last = start.state_dict(), model.state_dict()
    error = sum((got[name] - last[name]).double().pow(2).sum() for name in last)
    size = sum((first[name] - last[name]).double().pow(2).sum() for name in last)
    return float((error / size) ** 0.5)


class Loss(nn.Module):
    """The loss as a module of its own, around which alone the head is gathered."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, hidden: Tensor, head: list[nn.Parameter], batch: Batch) -> Tensor:
        rows, targets, weights = hidden[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), batch.mask[:, 1:].flatten()
        if self.fused:
            return fused_linear_cross_entropy(rows, head[0], targets, weights).total
        logits = torch.nn.functional.linear(rows, head[0])
        return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()


class Tiny(L.LightningModule):
    """A language model whose loss is normalised as law 1 says, with what the tests look at kept on the side."""

    def __init__(
        self, folder: str, *, kind: str = "sgd", lr: float = LR, fused: bool = False, small: bool = False, **model: Any
    ) -> None:
        super().__init__()
        self.fused = fused
        self.loss = Loss(fused) if small else None
        self.folder, self.kind, self.lr, self.model_options = folder, kind, lr, model
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seen: list[dict[str, Any]] = []
        self._window = 0.0
        self._head: list[nn.Parameter] = []

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.policy = build(self.folder, **self.model_options)

    def on_fit_start(self) -> None:
        # A list hides the parameter from DeepSpeed's own detection, which works on attributes of modules.
        self._head = [self.policy.get_output_embeddings().weight]  # type: ignore[operator,union-attr]
        share_parameters(self.loss or self, self._head)

    on_validation_start = on_fit_start

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        total = self.token_sum(batch)
        loss = total / batch.window_weight
        self._window += float(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="sum"))
        return loss * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def token_sum(self, batch: Batch) -> Tensor:
        if self.loss is None:
            return token_sum(self.policy, self._head[0], batch, fused=self.fused)
        hidden = self.policy.model(input_ids=batch.ids).last_hidden_state  # type: ignore[operator]
        self.held_before_loss = self._head[0].numel()
        return self.loss(hidden, self._head, batch)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        steps = len(self.losses)
        if self.trainer.global_step > steps + self.skip_steps:
            self.losses.append(self._window)
            self._window = 0.0
            strategy = self.trainer.strategy
            if isinstance(strategy, ZeROStrategy):
                norm = strategy.grad_norm()
                self.norms.append(float("nan") if norm is None else float(norm))

    held_before_loss = 0
    """Elements of the head that are here before the loss is called, where the loss is a module of its own."""
    skip_steps = 0
    """Steps that an earlier run of a resumed one has done."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skip_steps = checkpoint["global_step"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        total = token_sum(self.policy, self._head[0], batch)
        self.log("val", self.trainer.strategy.reduce(total.detach().clone(), reduce_op="sum"), batch_size=1)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.kind == "sgd":
            return torch.optim.SGD(trained, lr=self.lr)
        optimizer = adamw_class(self.trainer.strategy)(trained, lr=self.lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(strategy: Any, out: str | Path, **options: Any) -> L.Trainer:
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    return L.Trainer(
        accelerator="cpu",
        devices=ranks.world_size(),
        strategy=strategy,
        default_root_dir=out,
        use_distributed_sampler=False,
        **{**dict.fromkeys(off, False), **options},
    )


def loader(micro_steps: int, accumulate: int, seed: int = 0) -> Any:
    rows = batches(micro_steps, accumulate, rank=ranks.rank(), world=ranks.world_size(), seed=seed)
    return torch.utils.data.DataLoader(rows, batch_size=None)  # type: ignore[arg-type]


def save_state(module: Tiny, path: Path) -> None:
    state = consolidated_state_dict(module.policy)
    if ranks.rank() == 0:
        torch.save({name: tensor.float().clone() for name, tensor in state.items()}, path)
