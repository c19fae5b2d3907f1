"""SFT and LoRA as objectives: laws 5 and 6 on one process, LoRASFT's equality with SFT, and learning by heart."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
import pytest
import torch

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.single_file import AtomicCheckpointIO
from ptl.data.module import ChatDataModule, Preparation
from ptl.data.sources import Source
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.lora import LoRASFT
from ptl.objectives.sft import SFT
from tests import tiny
from tests.objectives import law


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return law.make_folder(tmp_path_factory.mktemp("sft"))


class Losses(L.Callback):
    """Keeps each micro-batch's loss as it was returned."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.ids: list[list[int]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(outputs["loss"].item())
        self.ids.append(batch.input_ids.flatten().tolist())


def data_of(folder, objective, **options: Any) -> ChatDataModule:
    data = ChatDataModule(
        [Source(path=f"{folder}/rows.jsonl")],
        max_length=256,
        preparation=Preparation(cache_dir=f"{folder}/cache", num_proc=1),
        **options,
    )
    data.bind(view=objective.view, tokenizer=objective.spec.name)
    return data


def fit(folder, objective, *callbacks: Any, ckpt_path=None, data_options=None, **kwargs: Any):
    losses = Losses()
    defaults: dict[str, Any] = dict(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
    )
    trainer = L.Trainer(**{**defaults, **kwargs}, callbacks=[losses, *callbacks])
    trainer.fit(objective, datamodule=data_of(folder, objective, **(data_options or {})), ckpt_path=ckpt_path)
    return trainer, losses


def objective_of(folder, kind: type[SFT] = SFT, adapter: LoRA | None = None, dropout_seed: int = 0, **kwargs: Any):
    L.seed_everything(dropout_seed, verbose=False)
    options: dict[str, Any] = {"optimizer": Optimizer(lr=1e-3), "schedule": Schedule(kind="cosine", warmup=2)}
    return kind(ModelSpec(name=f"{folder}/model", adapter=adapter), **{**options, **kwargs})


def test_lora_sft_is_sft_with_an_adapter(folder):
    _, one = fit(folder, objective_of(folder, LoRASFT))
    _, two = fit(folder, objective_of(folder, SFT, LoRA()))
    assert one.values == two.values and len(one.values) == 24


def test_law_5_the_frozen_base_gets_no_gradient_no_optimizer_and_no_checkpoint(folder, tmp_path):
    objective = objective_of(folder, LoRASFT)
    trainer, _ = fit(folder, objective, Checkpoint(dirpath=str(tmp_path)))
    frozen = {name: p for name, p in objective.named_parameters() if not p.requires_grad}
    assert frozen and all(p.grad is None for p in frozen.values())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in objective.parameters() if p.requires_grad}
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]
    assert saved and not set(saved) & set(frozen)
    before = tiny.make_model(len(tiny.make_tokenizer())).state_dict()
    base = objective.policy.get_base_model().state_dict()  # pyright: ignore[reportCallIssue]
    for name, value in before.items():
        kept = base.get(name, base.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(kept, value), name


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4, dropout=0.1)], ids=["full", "lora"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_law_6_a_resume_in_the_middle_of_an_epoch_is_exact(folder, tmp_path, adapter, accumulate):
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    whole = objective_of(folder, SFT, adapter)
    trainer, straight = fit(folder, whole, **options)
    half = objective_of(folder, SFT, adapter)
    steps = 16 // accumulate
    stopped, first = _stopped(folder, half, tmp_path, steps, options)
    rest = objective_of(folder, SFT, adapter, dropout_seed=99)
    resumed, second = fit(folder, rest, ckpt_path=next(tmp_path.glob("*.ckpt")), **options)
    assert stopped.global_step == steps and resumed.global_step == trainer.global_step
    assert first.ids + second.ids == straight.ids
    if adapter is None:  # dropout draws other numbers after a restart; the data, steps and rates stay the same
        assert first.values + second.values == straight.values
        for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


class StopAt(L.Callback):
    """Stops a run between two steps, as a preemption does, without changing its planned length."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = True


def _stopped(folder, objective, target, steps, options):
    checkpoint = Checkpoint(dirpath=str(target), every_n_train_steps=steps)
    return fit(folder, objective, checkpoint, StopAt(steps), **options)


def test_a_source_has_a_loss_of_its_own(folder, tmp_path):
    law.write_rows(tmp_path / "other.jsonl", count=8, seed=3)
    objective = objective_of(folder)
    data = ChatDataModule(
        [Source(path=f"{folder}/rows.jsonl", name="a"), Source(path=f"{tmp_path}/other.jsonl", name="b")],
        max_length=256,
        val_fraction=0.3,
        preparation=Preparation(cache_dir=f"{tmp_path}/cache", num_proc=1),
    )
    data.bind(view=objective.view, tokenizer=objective.spec.name)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(objective, datamodule=data)
    metrics = trainer.callback_metrics
    assert {"val/loss", "val/loss_a", "val/loss_b", "val/perplexity", "val/accuracy", "val/entropy"} <= set(metrics)
    low, high = sorted((float(metrics["val/loss_a"]), float(metrics["val/loss_b"])))
    assert low <= float(metrics["val/loss"]) <= high


def test_a_window_without_a_trained_token_changes_nothing(folder):
    objective = objective_of(folder, optimizer=Optimizer(kind="sgd", lr=1.0))
    objective.configure_model()
    data = data_of(folder, objective)
    data.prepare()
    batch = next(iter(data.train_dataloader()))
    empty = batch._replace(
        loss_mask=torch.zeros_like(batch.loss_mask),
        window_weight=torch.zeros((), dtype=torch.float64),
        trained=None,
        host_trained=None,
    )
    objective.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    objective.trainer.datamodule = data  # pyright: ignore[reportAttributeAccessIssue]
    loss = objective.training_step(empty, 0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


def test_eight_conversations_are_learned_by_heart_and_said_again_in_chat(tmp_path):
    from ptl.apps.chat import generate_reply
    from ptl.data.render import Renderer
    from ptl.types import Message

    tokenizer = tiny.make_tokenizer()
    tiny.save_folder(tmp_path / "model", tokenizer, hidden=64)
    pairs = [(f"What is {i}+{i}?", f"The answer is {2 * i}.") for i in range(7)] + [("Où est Shanghai ?", "En Chine.")]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = objective_of(
        tmp_path, optimizer=Optimizer(lr=1e-2), schedule=Schedule(kind="cosine", warmup=5, floor=0.05)
    )
    trainer, _ = fit(tmp_path, objective, max_epochs=120, data_options={"micro_batch_size": 8})
    assert float(trainer.callback_metrics["train/loss"]) < 0.05
    objective.policy.eval()
    renderer = Renderer(tokenizer)
    for question, answer in pairs:
        asked = [Message(role="user", content=question)]
        assert generate_reply(objective.policy, renderer, asked, temperature=0.0, max_new_tokens=32) == answer
