"""Packed documents are as if each were alone, on every attention, and nothing else of the model changes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptl.models.attention import NAME as PACKED
from ptl.models.attention import Documents, packed_attention, packed_inputs
from ptl.models.heads import hidden_states
from ptl.models.selfcheck import check_model, packing_leak
from tests.models import zoo

ATTENTIONS = ["eager", "sdpa", PACKED]


def alone(model, docs) -> Tensor:
    """Hidden states [1, T, H] of each document in a forward pass of its own, one after the other."""
    return torch.cat([hidden_states(model, zoo.padded([doc])) for doc in docs], 1)


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_trap_sft_2_packed_equals_single_documents(name, attention, mode):
    model = getattr(zoo.make(name, attention), mode)()
    assert model.config.use_cache is True  # the default that makes transformers forget about packing
    docs = zoo.documents()
    weights = torch.randn(1, sum(zoo.LENGTHS), 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for hidden in (hidden_states(model, zoo.packed(docs)), alone(model, docs)):
        model.zero_grad()
        (hidden * weights).sum().backward()
        gradients.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (got, got_grads), (expected, expected_grads) = gradients
    close(got, expected)
    assert got_grads.keys() == expected_grads.keys()
    largest = max(float(g.abs().max()) for g in expected_grads.values())
    for key, grad in expected_grads.items():
        assert (got_grads[key] - grad).abs().max() < 2e-5 * largest, key


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_trap_sft_2_changing_document_one_leaves_document_two(name, attention):
    model = zoo.make(name, attention)
    docs = zoo.documents()
    other = [(docs[0][0].flip(0) % (zoo.VOCAB - 3) + 3, docs[0][1]), *docs[1:]]
    with torch.no_grad():
        before, after = hidden_states(model, zoo.packed(docs)), hidden_states(model, zoo.packed(other))
    n = zoo.LENGTHS[0]
    assert not torch.equal(before[:, :n], after[:, :n])
    assert torch.equal(before[:, n:], after[:, n:])


@pytest.mark.parametrize("name", [*zoo.MODELS, "GptOss"])
def test_equals_eager(name):
    """Soft caps and sinks included, which transformers' sdpa leaves out."""
    docs = zoo.documents()
    for batch in (zoo.padded(docs), zoo.packed(docs[1:2])):
        with torch.no_grad():
            got = hidden_states(zoo.make(name), batch)
            expected = hidden_states(zoo.make(name, "eager"), batch)
        real = batch.document_ids >= 0
        close(got[real], expected[real])


def test_attention_sinks_stay_apart_where_eager_mixes():
    """GPT-OSS makes its eager mask without the positions (transformers 5.19)."""
    docs = zoo.documents()
    model = zoo.make("GptOss").eval()
    with torch.no_grad():
        close(hidden_states(model, zoo.packed(docs)), alone(model, docs))
    with pytest.raises(ValueError, match="lets packed documents see each other"):
        check_model(zoo.make("GptOss", "eager"), packed=True)


@pytest.mark.parametrize(("name", "attention"), [("OPT", "sdpa"), ("BioGpt", "eager")])
def test_trap_sft_2_a_model_that_mixes_documents_is_found(name, attention):
    model = zoo.make(name, attention)
    check_model(model, packed=False)
    with pytest.raises(ValueError, match=rf"{attention}.*set policy\.attention to packed, or data\.layout to padded"):
        check_model(model, packed=True)
    assert model.training and all(module.training for module in model.modules())
    check_model(zoo.make(name), packed=True)
    assert packing_leak(zoo.make(name).eval()) == 0.0


def test_a_collator_s_flash_arguments_are_enough():
    """``cu_seq_lens_q`` alone, as transformers' own DataCollatorWithFlattening gives it."""
    model = zoo.make("mistral_sliding").eval()
    batch = zoo.packed(zoo.documents())
    with torch.no_grad():
        got = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=9,
            max_length_k=9,
        )
        close(got.last_hidden_state, hidden_states(model, batch))


def test_restarting_positions_without_bounds_still_keep_documents_apart():
    model = zoo.make("mistral_sliding").eval()
    batch = zoo.packed(zoo.documents())
    with torch.no_grad():
        got = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        close(got.last_hidden_state, hidden_states(model, batch))


class Largest(TorchDispatchMode):
    """The largest number of elements of anything made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.elements = max(self.elements, t.numel() if isinstance(t, Tensor) else 0)
        return out


@pytest.mark.parametrize("name", ["llama_tied", "gemma2_softcaps_sliding", "mistral_sliding"])
def test_no_tensor_of_the_row_squared(name):
    lengths = (16,) * 32
    total = sum(lengths)
    model = zoo.make(name)
    batch = zoo.packed(zoo.documents(lengths))
    with Largest() as largest:
        hidden_states(model, batch).sum().backward()
    assert largest.elements < total * total / 2


@pytest.mark.parametrize("name", ["llama_tied", "gemma2_softcaps_sliding", "mistral_sliding", "gpt2"])
def test_generation_with_a_cache_equals_eager(name):
    """Left-padded prompts, one of them longer than the sliding window, with a growing and with a static cache."""
    ids = torch.tensor([[0, 0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26, 27]])
    mask = (ids > 0).long()
    for cache in ("dynamic", "static"):
        outs = [
            zoo.make(name, attention)
            .eval()
            .generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=6,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
                output_logits=True,
                return_dict_in_generate=True,
            )
            for attention in (PACKED, "eager")
        ]
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        close(torch.stack(outs[0].logits), torch.stack(outs[1].logits))


def test_a_cache_with_room_for_more_is_read_as_far_as_it_is_filled():
    """Without a mask, as a static cache is first filled: keys beyond the queries are not there yet."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=g) for n in (4, 7, 7))
    module = torch.nn.Identity()
    for softcap in (None, 5.0):
        room, _ = packed_attention(module, query, key, value, None, softcap=softcap)
        full, _ = packed_attention(module, query, key[:, :, :4], value[:, :, :4], None, softcap=softcap)
        torch.testing.assert_close(room, full)


def test_gradient_checkpointing_changes_nothing():
    model = zoo.make("gemma2_softcaps_sliding")
    batch = zoo.packed(zoo.documents())
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        hidden_states(model, batch).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_dropout_of_attention_weights_is_applied():
    model = zoo.make("llama_tied")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    batch = zoo.packed(zoo.documents())
    with torch.no_grad():
        assert not torch.equal(hidden_states(model, batch), hidden_states(model, batch))
        model.eval()
        assert torch.equal(hidden_states(model, batch), hidden_states(model, batch))


def test_a_saved_model_does_not_carry_the_name(tmp_path):
    model = zoo.make("llama_tied")
    model.save_pretrained(tmp_path)
    assert PACKED not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_what_flash_attention_needs():
    bounds = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    inputs = packed_inputs("flash_attention_2", bounds)
    assert inputs.pop("attention_mask") is None
    assert torch.equal(inputs.pop("cu_seq_lens_q"), bounds) and torch.equal(inputs.pop("cu_seq_lens_k"), bounds)
    assert inputs == {"max_length_q": 9, "max_length_k": 9}


def test_refusals():
    with pytest.raises(ValueError, match="'flex_attention' cannot keep packed documents apart"):
        packed_inputs("flex_attention", torch.tensor([0, 3], dtype=torch.int32))
    query = torch.zeros(2, 4, 6, 8)
    with pytest.raises(ValueError, match=r"need one row, no cache.*\(2, 4, 6, 8\)"):
        packed_attention(torch.nn.Identity(), query, query, query, None, documents=Documents((6,)))
    with pytest.raises(ValueError, match=r"causal=False.*data\.layout to padded"):
        packed_attention(
            torch.nn.Identity(), query[:1], query[:1], query[:1], None, is_causal=False, documents=Documents((6,))
        )
    batch = zoo.packed(zoo.documents())
    with pytest.raises(ValueError, match="StableLmAttention is not told where packed documents end"):
        hidden_states(zoo.make("StableLm"), batch)
    with pytest.raises(
        ValueError, match=r"linear_attention, so packed documents would mix: set data\.layout to padded"
    ):
        hidden_states(zoo.make("Qwen3Next", "sdpa"), batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama_tied", "mistral_sliding", "gemma2_softcaps_sliding"])
def test_the_kernel_of_cuda_equals_single_documents(name):
    model = zoo.make(name).to("cuda", torch.bfloat16)
    docs = zoo.documents((5, 90, 1, 33))
    batch = zoo.packed(docs)
    batch = batch.on("cuda")
    exact = zoo.make(name)
    rounded = zoo.make(name).to("cuda", torch.bfloat16)
    got, expected = hidden_states(model, batch), alone(exact, docs)
    singly = torch.cat([hidden_states(rounded, zoo.padded([doc]).on("cuda")) for doc in docs], 1)
    # What 16 bits cost the documents one by one is the measure of what they may cost a pack.
    assert (got.float().cpu() - expected).norm() < 1.5 * (singly.float().cpu() - expected).norm()
    for states in (got, singly, expected):
        states.float().square().sum().backward()
    for a, b, c in zip(model.parameters(), rounded.parameters(), exact.parameters()):
        if c.grad is not None:
            assert (a.grad.float().cpu() - c.grad).norm() < 1.5 * (b.grad.float().cpu() - c.grad).norm() + 1e-3
