"""The memory plan's parts against what autograd really saves, and against what must hold between strategies."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from ptl.functional.memory_plan import (
    NF4,
    activations,
    fits,
    frozen_bytes,
    largest_micro_batch,
    memory_plan,
)
from ptl.functional.model_size import model_size
from ptl.functional.plan_job import STRATEGIES, Job, Strategy
from ptl.functional.plan_rates import rates_of

LLAMA = {"model_type": "llama", "vocab_size": 512, "tie_word_embeddings": True, "num_attention_heads": 9}
SMALL = {**LLAMA, "hidden_size": 144, "intermediate_size": 384, "num_key_value_heads": 3}
EIGHT = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B = model_size({**EIGHT, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False})
SINGLE, ZERO = Strategy("single"), {s.name: s for s in STRATEGIES}
H100 = rates_of("h100")
TOKENS = 64


def saved_bytes(layers: int, dtype: torch.dtype, *, autocast: bool, lora: bool) -> int:
    """Bytes that autograd saves in a forward pass of a Llama on one packed row, weights left out."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from ptl.models.attention import NAME, packed_inputs

    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=layers, attn_implementation=NAME)).to(dtype)
    if lora:
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.to(torch.float32 if autocast else dtype)
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        cast = tuple(tensor.shape) in weights or tuple(tensor.shape[::-1]) in weights  # autocast's copy of a weight
        if place not in own and not cast:
            kept[place] = tensor
        return tensor

    bounds = torch.tensor([0, TOKENS], dtype=torch.int32)
    casting = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
        model.get_decoder()(
            input_ids=torch.zeros(1, TOKENS, dtype=torch.long),
            position_ids=torch.arange(TOKENS)[None],
            use_cache=False,
            **packed_inputs(NAME, bounds),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("dtype", "precision", "weights", "lora"),
    [
        (torch.float32, "fp32", "fp32", False),
        (torch.float32, "fp32", "fp32", True),
        (torch.float32, "bf16-mixed", "fp32", False),
        (torch.bfloat16, "bf16-mixed", "bf16", True),
        (torch.bfloat16, "bf16-true", "bf16", False),
        (torch.bfloat16, "bf16-true", "bf16", True),
    ],
)
def test_activations_are_what_autograd_saves(dtype, precision, weights, lora):
    autocast = precision == "bf16-mixed"
    one, three = (saved_bytes(layers, dtype, autocast=autocast, lora=lora) for layers in (1, 3))
    size = model_size({**SMALL, "num_hidden_layers": 2})
    job = Job(model=size, sequence=TOKENS, rank=4 if lora else None, weights=weights, precision=precision, cuda=False)
    assert activations(job, SINGLE) == pytest.approx(three - one, rel=0.01)


def job(**changes) -> Job:
    return Job(**{"model": LLAMA_8B, "sequence": 4096, "world": 8, **changes})


def test_states_are_cut_as_zero_says():
    weights, trained = LLAMA_8B.parameters, LLAMA_8B.parameters
    whole = memory_plan(job(weights="fp32"), ZERO["ddp"], H100).device
    assert whole["weights"] == 4 * weights and whole["optimizer states"] == 8 * trained
    assert "fp32 master weights" not in whole
    for name in ("zero1", "zero2", "zero3"):
        cut = memory_plan(job(), ZERO[name], H100).device
        assert cut["optimizer states"] == trained and cut["fp32 master weights"] == trained / 2
        assert cut["weights"] == 2 * weights / (8 if name == "zero3" else 1)


def test_more_cutting_takes_less():
    totals = [
        memory_plan(job(checkpointing="full"), ZERO[n], H100).device_total for n in ("ddp", "zero1", "zero2", "zero3")
    ]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4


def test_offload_moves_states_to_the_host():
    on = memory_plan(job(), ZERO["zero2"], H100)
    off = memory_plan(job(), ZERO["zero2-offload"], H100)
    states = sum(on.device[part] for part in ("fp32 master weights", "optimizer states"))
    assert on.device_total - off.device_total == pytest.approx(states * 1.05, rel=0.02)
    # All ranks' states, and the fp32 gradients that the step on the host reads.
    assert off.host["optimizer states"] == 8 * LLAMA_8B.parameters
    assert off.host["gradients"] == 4 * LLAMA_8B.parameters


def test_an_adapter_trains_little_and_codes_are_small():
    lora = memory_plan(job(rank=16, world=1), SINGLE, H100).device
    codes = memory_plan(job(rank=16, world=1, quantize=True), SINGLE, H100).device
    assert lora["optimizer states"] == 8 * LLAMA_8B.lora(16)
    assert lora["weights"] - codes["weights"] == pytest.approx(LLAMA_8B.linear * (2 - NF4))


def test_what_fits_on_an_80_gb_device():
    # Facts that are known of 8B models: full fine-tuning does not fit on one device, LoRA does; QLoRA fits in 24 GB.
    one = job(world=1, checkpointing="full")
    assert not fits(replace(one, weights="fp32"), SINGLE, H100)
    assert fits(replace(one, rank=16), SINGLE, H100)
    assert fits(replace(one, rank=16, quantize=True), SINGLE, rates_of("rtx4090"))
    assert not fits(replace(one, rank=16), SINGLE, rates_of("l4"))
    assert not fits(job(checkpointing="full"), ZERO["zero2-offload"], H100, host_memory=64 * 2**30)


def test_largest_micro_batch_is_the_edge():
    most = largest_micro_batch(job(checkpointing="full"), ZERO["zero3"], H100)
    assert most > 1
    assert fits(job(checkpointing="full", micro_batch=most), ZERO["zero3"], H100)
    assert not fits(job(checkpointing="full", micro_batch=most + 1), ZERO["zero3"], H100)


def test_a_shared_teacher_takes_its_share():
    alone, shared = frozen_bytes(LLAMA_8B, ranks=1), frozen_bytes(LLAMA_8B, ranks=8)
    assert alone > 2 * LLAMA_8B.parameters > shared > 2 * LLAMA_8B.parameters / 8
    beside = memory_plan(job(teacher=LLAMA_8B, objective="distillation"), ZERO["zero3"], H100).device
    cut = memory_plan(job(teacher=LLAMA_8B, objective="distillation", teacher_sharded=True), ZERO["zero3"], H100).device
    assert beside["frozen models"] > 2 * LLAMA_8B.parameters > cut["frozen models"]
