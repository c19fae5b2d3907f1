"""Hidden states, heads and the loss made of them, against the model's own logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptl.functional.head import CHUNK_BYTES
from ptl.functional.neftune import neftune_noise
from ptl.models.attention import NAME as PACKED
from ptl.models.heads import HeadLoss, document_lengths, hidden_states, lm_head, lm_loss, shifted_targets
from ptl.models.selfcheck import check_model, head_error
from tests.models import zero_heads, zoo
from tests.ranks import run_ranks


def plain_loss(model: nn.Module, docs, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """The weighted sum from the model's own logits, document by document."""
    total = torch.zeros(())
    for ids, weights in docs:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        losses = F.cross_entropy(logits, ids[1:], reduction="none", label_smoothing=label_smoothing)
        total = total + (weights[1:] * (losses + z_loss * logits.logsumexp(-1) ** 2)).sum()
    return total


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, got: Tensor, expected: Tensor) -> dict[str, Tensor]:
    """Two losses of one model agree in value and in every gradient; returns the gradients."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got_grads, expected_grads = gradients(model, got), gradients(model, expected)
    assert got_grads.keys() == expected_grads.keys()
    largest = max(float(g.abs().max()) for g in expected_grads.values())
    for name, grad in expected_grads.items():
        assert (got_grads[name] - grad).abs().max() < 3e-5 * largest, name
    return got_grads


# ---- the loss on every architecture ----


@pytest.mark.parametrize("layout", [zoo.packed, zoo.padded], ids=["packed", "padded"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_loss_equals_the_models_own_logits(name, layout):
    model, docs = zoo.make(name), zoo.documents()
    out = lm_loss(model, layout(docs))
    assert_same(model, out.fused.total, plain_loss(model, docs))


@pytest.mark.parametrize("attention", ["eager", "sdpa", PACKED])
def test_smoothing_and_z_loss(attention):
    model, docs = zoo.make("llama_untied", attention), zoo.documents()
    out = lm_loss(model, zoo.packed(docs), label_smoothing=0.2, z_loss=0.01)
    assert_same(model, out.fused.total, plain_loss(model, docs, label_smoothing=0.2, z_loss=0.01))


@pytest.mark.parametrize("name", [*zoo.MODELS, "GptOss", "HyperCLOVAX", "RecurrentGemma"])
def test_the_head_is_the_models_own(name):
    assert head_error(zoo.make(name, "eager").eval()) < 1e-5


def test_a_head_that_is_not_understood_is_found():
    model = zoo.make("llama_untied")
    model.lm_head.register_forward_hook(lambda module, args, out: out * 1.1)
    with pytest.raises(ValueError, match="changes its logits after the output head"):
        check_model(model, packed=False)


def test_a_model_in_bfloat16():
    model, docs = zoo.make("llama_tied").bfloat16(), zoo.documents()
    out = lm_loss(model, zoo.packed(docs))
    out.fused.total.backward()
    assert out.fused.total.dtype == torch.float32
    assert abs(out.fused.total.item() / plain_loss(model, docs).item() - 1) < 0.02


def test_which_hidden_states_predict_a_trained_token():
    docs = zoo.documents((4, 1, 6))
    for batch in (zoo.packed(docs), zoo.padded(docs)):
        # A first token is no target, whatever weight it has.
        batch = batch._replace(loss_mask=batch.loss_mask + (batch.position_ids == 0) * 1.0)
        positions, targets, weights = shifted_targets(batch)
        expected = []
        for b in range(batch.input_ids.shape[0]):
            for t in range(1, batch.input_ids.shape[1]):
                same = batch.document_ids[b, t] == batch.document_ids[b, t - 1] != -1
                if same and batch.loss_mask[b, t] > 0:
                    place = b * batch.input_ids.shape[1] + t - 1
                    expected.append((place, int(batch.input_ids[b, t]), float(batch.loss_mask[b, t])))
        assert list(zip(positions.tolist(), targets.tolist(), weights.tolist())) == expected
        documents = lm_loss(zoo.make("llama_tied"), batch).documents
        assert documents.tolist() == [int(batch.document_ids.flatten()[p]) for p, _, _ in expected]


# ---- memory ----


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.elements, self.name = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.numel() > self.elements:
                self.elements, self.name = t.numel(), func.__name__
        return out


@pytest.mark.parametrize("name", ["llama_tied", "gemma2_softcaps_sliding"])
def test_no_tensor_of_all_logits(name):
    vocab, lengths = 40_000, (60,) * 20
    model = zoo.make(name)
    model.resize_token_embeddings(vocab, mean_resizing=False)
    docs = [(ids, torch.ones(len(ids)) * (torch.arange(len(ids)) > 0)) for ids, _ in zoo.documents(lengths)]
    with Largest() as largest:
        lm_loss(model, zoo.packed(docs), metrics=True).fused.total.backward()
    logits = sum(lengths) * vocab
    assert largest.elements <= 1.05 * CHUNK_BYTES["cpu"] / 4 < logits / 2, largest.name


def test_no_trained_token_is_a_zero_that_reaches_every_parameter():
    for layout in (zoo.packed, zoo.padded):
        model = zoo.make("llama_untied")
        docs = [(ids, torch.zeros(len(ids))) for ids, _ in zoo.documents()]
        out = lm_loss(model, layout(docs), label_smoothing=0.1, z_loss=0.1, metrics=True)
        assert out.fused.total == 0 and out.fused.weight == 0 and len(out.documents) == 0
        out.fused.total.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_no_gradient_work_without_gradients():
    model, batch = zoo.make("llama_tied").eval(), zoo.packed(zoo.documents())
    with torch.no_grad():
        quiet = lm_loss(model, batch, metrics=True).fused
    loud = lm_loss(model, batch, metrics=True).fused
    assert not quiet.total.requires_grad
    for a, b in zip(quiet, loud):
        torch.testing.assert_close(a, b.detach())


# ---- adapters ----


def adapted(name: str = "llama_untied", *, checkpointing: bool = False, **options) -> nn.Module:
    model = zoo.make(name)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "init_lora_weights": False, **options}
    )
    return get_peft_model(model, config).train()


HEAD = ["q_proj", "down_proj", "lm_head"]
ROWS = sorted(set(zoo.documents()[1][0].tolist()))[:2]
"""Tokens that occur, or their input rows would have no gradient."""
ADAPTERS = {
    "all_linear": {},
    "head": {"target_modules": HEAD},
    "head_rslora": {"target_modules": HEAD, "use_rslora": True},
    "head_lora_bias": {"target_modules": ["lm_head", "dense"], "lora_bias": True, "name": "phi_head_bias"},
    "head_dora": {"target_modules": HEAD, "use_dora": True},
    "head_copy": {"modules_to_save": ["lm_head"]},
    "rows_tied": {"trainable_token_indices": ROWS, "name": "llama_tied"},
    "rows_untied": {"trainable_token_indices": {"embed_tokens": ROWS, "lm_head": ROWS}},
    "head_tied": {"target_modules": HEAD, "name": "llama_tied"},
    "softcap_head": {"target_modules": HEAD, "name": "gemma2_softcaps_sliding"},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ADAPTERS)
def test_trap_sft_13_fused_equals_plain(case, checkpointing):
    model = adapted(checkpointing=checkpointing, **ADAPTERS[case])
    assert model.training
    docs = zoo.documents()
    grads = assert_same(model, lm_loss(model, zoo.packed(docs)).fused.total, plain_loss(model, docs))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained and any("lora_A" in name for name in trained)
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_trap_sft_13_dropout_of_an_adapted_head_is_applied():
    model, docs = adapted(target_modules=["lm_head"], lora_dropout=0.5), zoo.documents((20,))
    batch = zoo.packed([(ids, (torch.arange(len(ids)) > 0).float()) for ids, _ in docs])
    torch.manual_seed(3)
    got = lm_loss(model, batch).fused.total
    ids, weights = batch.input_ids[0], batch.loss_mask[0]
    hidden = hidden_states(model, batch)[:, :-1]
    torch.manual_seed(3)
    logits = model.get_base_model().lm_head(hidden)[0]  # dropout takes the same random numbers
    expected = (weights[1:] * F.cross_entropy(logits, ids[1:], reduction="none")).sum()
    assert_same(model, got, expected)
    assert not torch.equal(got, lm_loss(model, batch).fused.total)


@pytest.mark.parametrize("case", ["head", "head_dora", "head_copy", "rows_tied", "rows_untied"])
def test_an_adapter_switched_off_is_the_base(case):
    model, docs = adapted(**ADAPTERS[case]), zoo.documents()
    batch = zoo.packed(docs)
    base = lm_loss(zoo.make(ADAPTERS[case].get("name", "llama_untied")), batch).fused.total
    with model.disable_adapter():
        torch.testing.assert_close(lm_loss(model, batch).fused.total, base)
    assert not torch.allclose(lm_loss(model, batch).fused.total, base)


def test_a_merged_adapter_and_two_at_once():
    model, docs = adapted(target_modules=HEAD), zoo.documents()
    batch = zoo.packed(docs)
    live = lm_loss(model, batch).fused.total
    model.merge_adapter()
    torch.testing.assert_close(lm_loss(model, batch).fused.total, live, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        base = lm_loss(zoo.make("llama_untied"), batch).fused.total
        torch.testing.assert_close(lm_loss(model, batch).fused.total, base, rtol=1e-5, atol=1e-5)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_same(model, lm_loss(model, batch).fused.total, plain_loss(model, docs))


def test_a_frozen_head_costs_no_gradient():
    model = adapted()
    head = lm_head(model)
    assert head.low_rank is None and not head.weight.requires_grad
    assert head.weight is model.get_base_model().lm_head.weight
    assert lm_head(adapted(target_modules=HEAD)).weight is not None  # a plain LoRA head makes no second matrix
    assert lm_head(wrapped := adapted(target_modules=HEAD)).weight is wrapped.get_base_model().lm_head.base_layer.weight


def test_heads_that_are_refused():
    with pytest.raises(ValueError, match=r"set policy\.adapter\.dropout to 0"):
        lm_head(adapted(target_modules=HEAD, use_dora=True, lora_dropout=0.1))
    model = zoo.make("llama_untied")
    model.lm_head.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="must not be quantised"):
        lm_head(model)
    with pytest.raises(ValueError, match="no output embedding"):
        lm_head(zoo.make("llama_untied").model)


# ---- NEFTune ----


def test_neftune_noise_has_the_documents_scale():
    lengths = document_lengths(zoo.packed(zoo.documents((400, 25))))
    assert lengths.tolist() == [[400] * 400 + [25] * 25]
    embeddings = torch.zeros(1, 425, 64)
    torch.manual_seed(0)
    noise = neftune_noise(embeddings, lengths, alpha=5.0)
    for part, length in ((noise[:, :400], 400), (noise[:, 400:], 25)):
        bound = 5.0 / (length * 64) ** 0.5
        assert part.abs().max() <= bound
        assert abs(part.std().item() / (bound / 3**0.5) - 1) < 0.03  # the deviation of a uniform number
        assert abs(part.mean().item()) < 0.03 * bound


def test_neftune_is_the_same_packed_or_padded_and_spares_padding():
    docs = zoo.documents((6, 2))
    lengths = document_lengths(zoo.padded(docs))
    assert lengths.tolist() == [[6] * 6, [2, 2, 0, 0, 0, 0]]
    noise = neftune_noise(torch.ones(2, 6, 8), lengths, 5.0)
    assert noise[0].abs().min() > 0 and torch.equal(noise[1, 2:], torch.zeros(4, 8))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2_softcaps_sliding"])
def test_neftune_acts_in_training_alone(name):
    model, batch = zoo.make(name), zoo.packed(zoo.documents())
    quiet = lm_loss(model, batch).fused.total
    noisy = lm_loss(model, batch, neftune_alpha=5.0).fused.total
    assert not torch.equal(noisy, quiet)
    assert torch.equal(lm_loss(model, batch).fused.total, quiet)  # nothing stays behind
    assert torch.equal(lm_loss(model, batch, neftune_alpha=0.0).fused.total, quiet)
    noisy.backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0
    model.eval()
    assert torch.equal(lm_loss(model, batch, neftune_alpha=5.0).fused.total, quiet)


def test_neftune_with_an_adapter_and_checkpointing():
    model, batch = adapted(checkpointing=True), zoo.packed(zoo.documents())
    lm_loss(model, batch, neftune_alpha=5.0).fused.total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- ZeRO-3 ----


@pytest.fixture(scope="module")
def sharded():
    return run_ranks("tests.models.zero_heads:sharded", 1, timeout=120)[0]


@pytest.mark.parametrize(("name", "adapter", "reader"), zero_heads.CASES)
def test_zero_3_gathers_the_head_for_the_loss(sharded, name, adapter, reader):
    result = sharded[f"{name}-{adapter}-{reader}"]
    losses = zero_heads.plain(name, adapter)
    assert result["losses"] == pytest.approx(losses, rel=1e-5)
    assert losses[1] == 0 and losses[3] != pytest.approx(zero_heads.plain(name, adapter, lr=0.0)[3], rel=1e-4)
    assert result["largest_after"] == 0
    # As a module of its own the loss has let the head go by the end of the step's forward.
    assert (result["held"] == 0) == (reader == "module")


def test_the_loss_module_owns_no_parameter():
    assert not list(HeadLoss(zoo.make("llama_tied")).parameters())
