"""Quantised bases: training on them, what an evaluation must not change, and the way back to floats."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptl.data.module import ChatDataModule, Preparation
from ptl.data.sources import Source
from ptl.models.adapters import adapter_disabled
from ptl.models.build import load_base
from ptl.models.export import export, largest_logit_change
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.quantize import dequantize_state, is_quantized, quantization_config
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.lora import LoRASFT
from tests import tiny
from tests.gpu_parts import fit_here, on_gpu

DOCUMENTS = [[5, 9, 20, 33, 41, 7], [100, 101, 3, 11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """96 columns: no multiple of nf4's block of 64, which bitsandbytes' CPU evaluation fails on by itself."""
    return tiny.save_folder(tmp_path_factory.mktemp("bases") / "96", tokenizer, hidden=96, seed=3)


def build(folder, kind, **adapter):
    torch.manual_seed(0)
    return ModelSpec(name=str(folder), attention="sdpa", quantize=kind, adapter=LoRA(rank=4, **adapter)).build()


def gradients(model) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    for ids in DOCUMENTS:
        x = torch.tensor([ids])
        logits = model(input_ids=x, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], x[0, 1:]).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
def test_a_quantised_base_trains_on_the_cpu(kind, checkpointing, folder):
    torch.manual_seed(0)
    model = ModelSpec(
        name=str(folder), quantize=kind, adapter=LoRA(rank=4), gradient_checkpointing=checkpointing, attention="sdpa"
    ).build()
    assert is_quantized(model) and model.training
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = torch.tensor([DOCUMENTS[0]]), []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trap_validation_between_steps_leaves_a_quantised_model_as_it_was(kind, folder):
    """On a CPU with AVX512-BF16, bitsandbytes repacks its codes in an evaluation; no gradient passes afterwards."""
    model = build(folder, kind, init="gaussian")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    before, weights = gradients(model), dequantize_state(model.state_dict())
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([DOCUMENTS[0]]), use_cache=False)
    after = gradients(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in dequantize_state(model.state_dict()).items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dequantised_weights_compute_what_the_codes_compute(dtype, folder):
    spec = ModelSpec(name=str(folder), dtype=dtype, attention="sdpa", quantize="nf4", adapter=LoRA())
    codes = load_base(spec)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=codes.dtype)
    original = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.load_state_dict(dequantize_state(codes.state_dict()))
    assert largest_logit_change(codes, plain, DOCUMENTS) < (1e-5 if dtype == "fp32" else 0.05)
    assert any(not torch.equal(tensor, original[name]) for name, tensor in plain.state_dict().items())


def test_heads_stay_in_floats_and_codes_are_bytes(folder):
    for head in ("lm", "scalar"):
        spec = ModelSpec(name=str(folder), attention="sdpa", quantize="nf4", adapter=LoRA(), head=head)
        model = load_base(spec)
        kinds = {
            name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")
        }
        assert {kind for name, kind in kinds.items() if name not in ("lm_head", "score")} == {"Linear4bit"}
        assert kinds.get("lm_head" if head == "lm" else "score") in ("Linear", "ScalarHead")
        assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}


def test_trap_scale_1_4_codes_are_kept_as_bytes_whatever_the_dtype():
    """DeepSpeed casts float parameters to its engine's dtype, which would destroy codes stored as floats."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        config = quantization_config("nf4", dtype)
        assert config.bnb_4bit_quant_storage == torch.uint8 and config.bnb_4bit_compute_dtype == dtype


def test_trap_sft_12_merging_is_onto_the_base_that_was_trained_on(folder, tokenizer, tmp_path):
    model = build(folder, "nf4", init="gaussian")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    original = AutoModelForCausalLM.from_pretrained(folder)
    export(model, tokenizer, tmp_path / "dequantized")
    export(model, tokenizer, tmp_path / "original", base_state=original.state_dict())
    merged = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dequantized", "original")}
    change = {name: largest_logit_change(model, other, DOCUMENTS) for name, other in merged.items()}
    assert change["dequantized"] < 1e-5 < 1e-2 < change["original"]
    with adapter_disabled(model):
        quantisation = largest_logit_change(model, original, DOCUMENTS)
    assert change["original"] < 3 * quantisation  # what is lost is the quantisation, not the adapter
    for name, other in merged.items():
        assert not is_quantized(other)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())


def test_codes_without_their_scales_are_an_error():
    with pytest.raises(ValueError, match="no scales"):
        dequantize_state({"a.weight": torch.zeros(4, 1, dtype=torch.uint8)})


# ---- on a GPU ----


def check_fit(kind, accelerator, precision, tmp_path) -> None:
    """Five steps of LoRA on the same two rows over and over; the codes stay as they are."""
    tiny.save_folder(tmp_path / "model", tiny.make_tokenizer(), hidden=128, seed=3)
    chat = [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "The answer is 4."}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 10)
    torch.manual_seed(0)
    spec = ModelSpec(name=str(tmp_path / "model"), dtype="bf16", quantize=kind, adapter=LoRA(rank=8, dtype="fp32"))
    objective = LoRASFT(spec, optimizer=Optimizer(lr=3e-3), schedule=Schedule(kind="constant", warmup=0))
    preparation = Preparation(cache_dir=str(tmp_path / "cache"), num_proc=1)
    rows = [Source(path=str(tmp_path / "rows.jsonl"))]
    data = ChatDataModule(rows, max_length=128, micro_batch_size=2, preparation=preparation)
    data.bind(view=objective.view, tokenizer=objective.spec.name)
    losses = fit_here(objective, data, tmp_path, accelerator, precision=precision, gradient_clip_val=1.0)
    assert is_quantized(objective.policy)
    assert len(losses) == 5 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.05, losses


@on_gpu
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_on_a_quantised_base_trains_on_a_gpu(kind, tmp_path):
    check_fit(kind, "gpu", "bf16-mixed", tmp_path)
