"""How the strategy meets a trainer and a config, and what it refuses, in one process."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, MixedPrecision
from lightning.pytorch.strategies import Strategy

from ptl.strategies.deepspeed import (
    ZeROPrecision,
    ZeROStrategy,
    adamw_class,
    consolidated_state_dict,
    gathered,
    gathered_forward,
    share_parameters,
)
from ptl.strategies.partition import has_room_for_whole
from tests.tiny import make_model


def make_trainer(strategy, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False, **options
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_the_trainers_precision_is_taken_over(precision):
    trainer = make_trainer(ZeROStrategy(), precision=precision)
    assert isinstance(trainer.precision_plugin, ZeROPrecision)
    assert trainer.precision == precision


def test_a_stock_plugin_is_replaced_and_another_refused():
    strategy = ZeROStrategy()
    strategy.precision_plugin = DeepSpeedPrecision("bf16-true")
    assert isinstance(strategy.precision_plugin, ZeROPrecision)
    with pytest.raises(ValueError, match=r"takes trainer.precision, not a plugin of its own: got MixedPrecision"):
        strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")


def test_a_yaml_of_class_path_and_arguments_is_enough():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=str | Strategy)
    text = {
        "class_path": "ptl.strategies.deepspeed.ZeROStrategy",
        "init_args": {"stage": 3, "offload_parameters": True, "config": {"zero_optimization": {"overlap_comm": False}}},
    }
    strategy = parser.instantiate_classes(parser.parse_object({"strategy": text})).strategy
    assert isinstance(strategy, ZeROStrategy)
    assert strategy.stage == 3
    assert strategy.config["zero_optimization"]["overlap_comm"] is False
    with pytest.raises(ArgumentError, match=r"strategy[\s\S]*stage"):
        parser.parse_object({"strategy": {**text, "init_args": {"stage": 4}}})


class Small(L.LightningModule):
    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def one_rank(monkeypatch):
    """What a launcher sets, so that the trainer starts nothing and leaves no variables behind."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


def fit(module, strategy, **options) -> None:
    make_trainer(strategy, max_steps=1, **options).fit(module, torch.utils.data.DataLoader(torch.ones(2, 2)))


def test_trap_scale_0_2_manual_optimisation_is_refused(one_rank):
    """Several backward calls in a step train on the last micro-batch only, on every stage, without a word."""
    with pytest.raises(ValueError, match="needs automatic optimisation"):
        fit(Small(automatic=False), ZeROStrategy())


def test_clipping_by_value_is_refused(one_rank):
    with pytest.raises(ValueError, match=r"clips gradients by norm only, got trainer.gradient_clip_algorithm='value'"):
        fit(Small(), ZeROStrategy(), gradient_clip_val=1.0, gradient_clip_algorithm="value")


def test_what_the_cpu_lacks_is_refused(one_rank):
    with pytest.raises(ValueError, match="quantized_weights needs CUDA"):
        fit(Small(), ZeROStrategy(stage=3, quantized_weights=True))
    with pytest.raises(ValueError, match=r"no fp16 on the CPU, got trainer.precision='16-true'"):
        fit(Small(), ZeROStrategy(), precision="16-true")


def test_a_contradiction_of_trainer_and_config_is_found_before_the_model_is_loaded(one_rank):
    class Loads(Small):
        def configure_model(self) -> None:
            raise AssertionError("loaded")

    with pytest.raises(ValueError, match=r"contradicts trainer.accumulate_grad_batches=1"):
        fit(Loads(), ZeROStrategy(config={"gradient_accumulation_steps": 8}))


def test_casting_leaves_buffers_and_refuses_to_spoil_packed_weights():
    model = make_model()
    model.register_buffer("counts", torch.ones(2))
    cast = ZeROPrecision("bf16-true").convert_module(model)
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in cast.buffers()} == {torch.float32}
    assert {p.dtype for p in ZeROPrecision("bf16-mixed").convert_module(make_model()).parameters()} == {torch.float32}
    from bitsandbytes.nn import Params4bit

    packed = torch.nn.Module()
    packed.weight = Params4bit(torch.randn(64, 64), quant_storage=torch.float32).to("cpu")
    with pytest.raises(
        ValueError, match=r"weight packs 4-bit weights in torch.float32, and the engine casts to torch.bf"
    ):
        ZeROPrecision("bf16-mixed").convert_module(packed)


def test_trap_scale_0_9_batches_pass_through():
    batch = {"rewards": torch.tensor([0.1234567])}
    assert ZeROPrecision("bf16-true").convert_input(batch)["rewards"] is batch["rewards"]


def test_without_partitions_the_helpers_do_nothing():
    model = make_model()
    strategy = make_trainer("auto").strategy
    share_parameters(model, model.parameters())
    assert has_room_for_whole(model, strategy)
    with gathered(model), gathered_forward(strategy):
        state = consolidated_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    assert not any(tensor.requires_grad for tensor in state.values())
    model.model.requires_grad_(False)
    assert consolidated_state_dict(model, trainable_only=True) == {}  # the tied head is frozen with the embedding
    model.model.norm.requires_grad_(True)
    assert list(consolidated_state_dict(model, trainable_only=True)) == ["model.norm.weight"]


def test_the_optimizer_follows_the_offload():
    assert adamw_class(make_trainer("auto").strategy) is torch.optim.AdamW
    assert adamw_class(ZeROStrategy()) is torch.optim.AdamW
    assert adamw_class(ZeROStrategy(offload_optimizer=True)).__name__ == "DeepSpeedCPUAdam"


def test_before_a_step_there_is_nothing_to_report():
    strategy = ZeROStrategy()
    assert strategy.grad_norm() is None
    assert strategy.skipped_steps() == 0
