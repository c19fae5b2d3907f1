"""FLOP formulas against published figures, against torch's own count, and the table of peaks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ptl.callbacks.shape import model_shape
from ptl.functional.flops import PEAKS, ModelShape, Work, forward_flops, peak_flops, training_flops
from ptl.models.adapters import add_lora
from ptl.models.spec import LoRA
from tests import tiny


def llama(hidden: int, layers: int, ffn: int, kv_hidden: int, vocab: int, *, lora: bool) -> ModelShape:
    """A Llama's matrix products; LoRA's own matrices, below 1 % of them, are left out as in the published counts."""
    body = layers * (2 * hidden * hidden + 2 * hidden * kv_hidden + 3 * hidden * ffn)
    head = hidden * vocab
    sizes = {"body_frozen": body, "head_frozen": head} if lora else {"body_trained": body, "head_trained": head}
    return ModelShape(**sizes, attention=layers * hidden)


LLAMA3_8B = {"hidden": 4096, "layers": 32, "ffn": 14336, "kv_hidden": 1024, "vocab": 128256}
LLAMA2_7B = {"hidden": 4096, "layers": 32, "ffn": 11008, "kv_hidden": 4096, "vocab": 32000}
PER_TOKEN = Work(tokens=1, head_tokens=1)


def test_lora_follows_the_published_count_of_nemo_automodel():
    """Llama-3-8B LoRA on one H100 at 4,096 tokens: 402 TFLOP/s at 12,473 tokens/s.

    Its formula discounts causality and scales attention by 2/3 as if it had frozen weights: 4A where ours is 12A.
    """
    published = 402e12 / 12_473
    products = training_flops(llama(**LLAMA3_8B, lora=True), PER_TOKEN)
    attention = 4 * 32 * 4096 * 4096
    assert products + attention == pytest.approx(published, rel=0.005)
    # What a tool says that counts LoRA as full fine-tuning: half as much again.
    assert training_flops(llama(**LLAMA3_8B, lora=False), PER_TOKEN) == pytest.approx(1.5 * products)


def test_lora_and_full_fine_tuning_follow_the_published_counts_of_nemo_on_packed_data():
    """Llama-2-7B, packed, 8 x H100: full 673 TFLOP/s at 16,891 tokens/s, LoRA 663 at 24,824; short documents, so that
    attention is within a few percent of nothing."""
    full = training_flops(llama(**LLAMA2_7B, lora=False), PER_TOKEN)
    assert full == pytest.approx(673e12 / 16_891, rel=0.01)
    assert training_flops(llama(**LLAMA2_7B, lora=True), PER_TOKEN) == pytest.approx(663e12 / 24_824, rel=0.015)


def test_published_utilisation_of_lora_on_h100():
    peak = peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    assert peak is not None
    products = training_flops(llama(**LLAMA3_8B, lora=True), PER_TOKEN)
    assert 12_473 * (products + 4 * 32 * 4096 * 4096) / peak == pytest.approx(0.41, abs=0.01)


def counted(model, rows: int, length: int) -> float:
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    return counter.get_total_flops()


# torch counts the rotary angles' product too; a hidden size of 128 makes it negligible.
SIZES = {"hidden": 128, "layers": 3, "attn_implementation": "eager"}


@pytest.mark.parametrize("tie", [True, False])
def test_full_fine_tuning_equals_torchs_count(tie):
    model = tiny.make_model(tie=tie, **SIZES).train()
    rows, length = 2, 48
    work = Work(rows * length, rows * length, rows * length**2)
    assert training_flops(model_shape(model), work) == pytest.approx(counted(model, rows, length), rel=2e-4)


def test_lora_equals_torchs_count():
    model = add_lora(tiny.make_model(**SIZES), LoRA(rank=4)).train()
    model.enable_input_require_grads()  # else torch saves the input gradients of the first layer's frozen products
    shape = model_shape(model)
    assert shape.body_frozen > 10 * shape.body_trained > 0 and shape.head_trained == 0
    rows, length = 2, 48
    work = Work(rows * length, rows * length, rows * length**2)
    assert training_flops(shape, work) == pytest.approx(counted(model, rows, length), rel=2e-4)


def test_a_trained_head_on_a_frozen_body_equals_torchs_count():
    model = tiny.make_model(tie=False, **SIZES).train().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    shape = model_shape(model)
    assert not shape.flows
    work = Work(48, 48, 48**2)
    assert training_flops(shape, work) == pytest.approx(counted(model, 1, 48), rel=2e-4)


def test_forward_equals_torchs_count():
    model = tiny.make_model(**SIZES)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, 48, dtype=torch.long), use_cache=False)
    assert forward_flops(model_shape(model), Work(48, 48, 48**2)) == pytest.approx(counter.get_total_flops(), rel=2e-4)


def test_trap_scale_packed_documents_count_their_own_squares():
    shape = ModelShape(attention=7.0)
    packed = training_flops(shape, Work(100, 0, pairs=60**2 + 40**2))
    assert packed == 12 * 7 * (60**2 + 40**2) < training_flops(shape, Work(100, 0, pairs=100**2))


def test_a_window_bounds_attention():
    assert training_flops(ModelShape(sliding=2.0, window=8), Work(20, 0, sliding_pairs=20 * 8)) == 12 * 2 * 160


def test_the_head_counts_where_it_is_applied():
    shape = ModelShape(body_trained=10, head_trained=1000)
    assert training_flops(shape, Work(100, 7)) == 6 * (10 * 100 + 1000 * 7)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H200 NVL", "bf16", 835e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA B200", "bf16", 2.25e15),
        ("NVIDIA GB200", "bf16", 2.5e15),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA A10G", "bf16", 70e12),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("Some Accelerator 9000", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
    ],
)
def test_peaks(name, dtype, peak):
    assert peak_flops(name, dtype) == peak


def test_trap_scale_an_unknown_device_has_no_utilisation():
    """A fall back to another device's peak would print a number that is not true."""
    assert peak_flops("cpu", "bf16") is None
    with pytest.raises(ValueError, match="dtype must be one of bf16"):
        peak_flops("NVIDIA A100-SXM4-80GB", "int8")


def test_tensor_cores_are_never_slower_than_the_plain_units():
    for _, peak in PEAKS:
        half = [value for value in (peak.bf16, peak.fp16) if value]
        assert half and peak.fp32 and min(half) >= (peak.tf32 or 0) and (peak.tf32 or peak.fp32) >= peak.fp32
