"""Students with a narrower residual stream: which channels stay, what stays exact, what is refused, and learning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ptl.apps.synth import main
from ptl.models.adapters import add_lora
from ptl.models.build import build
from ptl.models.channels import Channels, choose_channels
from ptl.models.importance import stream_activity
from ptl.models.spec import LoRA, ModelSpec, Shrink
from ptl.models.students import make_student
from tests import tiny
from tests.models import zoo
from tests.models.student_parts import IDS, batches, logits, teacher
from tests.objectives import kd, law

WIDTH = zoo.SHAPE["hidden_size"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "head_dim": None}),
    "llama_biases": ("Llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": None}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "head_dim": None}),
    "qwen2_untied": ("Qwen2", {"tie_word_embeddings": False, "head_dim": None}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
}
DEAD = [0, 3, 9, 10, 17, 22, 30, 31]


def make(family: str, *, depth: int = 3, seed: int = 0, **options: Any) -> Any:
    """A model of 32 channels, 4 heads in 2 key-value groups and 48 neurons, in eval mode, its weights far from zero."""
    prefix, own = FAMILIES.get(family, (family, {}))
    shape = {**zoo.SHAPE, "num_hidden_layers": depth, **own, **options}
    if shape["head_dim"] is None:
        shape.pop("head_dim")
    return teacher(prefix, shape, seed)


def norms_of(model: Any) -> list[Any]:
    pairs = ((layer.input_layernorm, layer.post_attention_layernorm) for layer in model.model.layers)
    return [*(norm for pair in pairs for norm in pair), model.model.norm]


@torch.no_grad()
def silence(model: Any, channels: list[int]) -> None:
    """Has nothing ever write to some channels."""
    model.model.embed_tokens.weight[:, channels] = 0
    for layer in model.model.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight[channels] = 0
            if writer.bias is not None:
                writer.bias[channels] = 0


# ---- what stays exact ----


@pytest.mark.parametrize("measured", [False, True], ids=["weights", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_that_are_always_zero_go_and_the_logits_stay(family, measured):
    # Epsilon is all that would differ: 24 channels have 32/24 of the mean square, and the same epsilon beside it.
    teacher = make(family, rms_norm_eps=1e-12)
    silence(teacher, DEAD)
    expected = logits(teacher)
    weights = teacher.model.embed_tokens.weight.clone()
    read = batches() if measured else None
    student: Any = make_student(teacher, Shrink(hidden_size=WIDTH - len(DEAD)), batches=read)
    alive = [channel for channel in range(WIDTH) if channel not in DEAD]
    assert torch.equal(student.model.embed_tokens.weight, weights[:, alive])
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("measured", [False, True], ids=["weights", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_its_teacher_with_the_other_channels_shut_off(family, measured):
    """The reference is as wide as the teacher: nothing writes to the other channels, and each norm gives less.

    Where the kept channels hold a share s of the squared length, what the norm divides by shrinks by sqrt(s); the
    norm's weight is made smaller by as much, so that the rest of the network reads what it read.
    """
    teacher = make(family, rms_norm_eps=1e-12)
    reference = copy.deepcopy(teacher)
    read = batches() if measured else None
    channels = choose_channels(teacher, list(teacher.model.layers), 20, read)
    assert len(channels.kept) == 20 and all(0.3 < share < 1 for share in channels.shares)
    silence(reference, sorted(set(range(WIDTH)) - set(channels.kept.tolist())))
    with torch.no_grad():
        for norm, share in zip(norms_of(reference), channels.shares, strict=True):
            norm.weight *= share**0.5
    student = make_student(teacher, Shrink(hidden_size=20), batches=read)
    torch.testing.assert_close(logits(student), logits(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measured", [False, True], ids=["weights", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_channels_is_its_teacher_bit_for_bit(family, measured):
    teacher = make(family)
    before, expected = copy.deepcopy(teacher.state_dict()), logits(teacher)
    student = make_student(teacher, Shrink(hidden_size=WIDTH), batches=batches() if measured else None)
    after = student.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)
    assert torch.equal(logits(student), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_keeps_the_same_channels_and_all_of_its_other_side(family):
    teacher = make(family)
    before = copy.deepcopy(teacher.state_dict())
    kept = choose_channels(teacher, list(teacher.model.layers), 12).kept
    after = make_student(teacher, Shrink(hidden_size=12)).state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        part = name.split(".")[-2]
        old = before[name]
        if part in ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            expected = old[:, kept] if name.endswith("weight") else old
        elif part in ("o_proj", "down_proj"):
            expected = old[kept]
        elif part in ("q_norm", "k_norm"):
            expected = old
        else:  # a norm of the stream, times one factor
            expected = old[kept] * (value[0] / old[kept][0])
            torch.testing.assert_close(value, expected)
            continue
        assert torch.equal(value, expected), name


# ---- saved, cut in other ways too, generating ----


@pytest.mark.parametrize("family", FAMILIES)
def test_law_9_a_narrower_student_is_saved_and_loaded_elsewhere(family, tmp_path):
    teacher = make(family)
    head_dim, tied = teacher.model.layers[0].self_attn.head_dim, teacher.config.tie_word_embeddings
    shrink = Shrink(layers=[0, 2], intermediate_size=40, heads=2, hidden_size=20)
    student: Any = make_student(teacher, shrink, batches=batches())
    student.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)
    for model in (student, again):
        assert (model.config.hidden_size, model.config.head_dim) == (20, head_dim)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert model.model.layers[1].self_attn.o_proj.weight.shape == (20, 2 * head_dim)
        assert model.model.layers[0].mlp.gate_proj.weight.shape == (40, 20)
    assert (student.get_input_embeddings().embedding_dim, student.get_output_embeddings().in_features) == (20, 20)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("family", ["llama_tied", "qwen3"])
def test_a_narrower_student_generates_the_same_with_and_without_a_cache(family):
    student: Any = make_student(make(family), Shrink(hidden_size=16))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    one, other = (student.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(one, other) and one.shape[1] == IDS.shape[1] + 12


# ---- which channels ----


def test_what_passes_a_norm_is_measured_over_real_tokens_in_any_layout():
    teacher = make("llama_tied")
    teacher.set_attn_implementation("ptl_packed")
    docs = zoo.documents((7, 3, 9))
    norms = norms_of(teacher)
    before: dict[Any, list[torch.Tensor]] = {norm: [] for norm in norms}
    after: dict[Any, list[torch.Tensor]] = {norm: [] for norm in norms}

    def look(norm: nn.Module, args: Any, output: torch.Tensor) -> None:
        before[norm].extend(args[0][0].double())
        after[norm].extend(output[0].double())

    handles = [norm.register_forward_hook(look) for norm in norms]
    with torch.no_grad():
        for ids, _ in docs:
            teacher(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    for read in ([zoo.padded(docs)], [zoo.packed(docs)], [zoo.packed(docs[:1]), zoo.padded(docs[1:])]):
        found = stream_activity(teacher, norms, read)
        assert len(found) == 7 and not any(norm._forward_hooks for norm in norms)
        for norm, one in zip(norms, found, strict=True):
            outputs = torch.stack(after[norm]).abs().mean(0)
            shares = torch.stack([x**2 / (x**2).sum() for x in before[norm]]).mean(0)
            torch.testing.assert_close(one.outputs, outputs, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(one.shares, shares, rtol=1e-5, atol=1e-7)
            assert float(one.shares.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="no tokens to measure"):
        stream_activity(teacher, norms, [])


def test_channels_are_chosen_by_what_the_norms_of_the_layers_that_stay_give_on_tokens():
    teacher = make("qwen2_tied")
    layers = [teacher.model.layers[0], teacher.model.layers[2]]
    norms = norms_of(teacher)
    measured = stream_activity(teacher, [*norms[:2], *norms[4:]], batches())
    total = sum(one.outputs for one in measured)
    channels: Channels = choose_channels(teacher, layers, 10, batches())
    assert channels.kept.tolist() == sorted(torch.as_tensor(total).topk(10).indices.tolist())
    assert channels.shares == pytest.approx([float(one.shares[channels.kept].sum()) for one in measured])


def test_without_tokens_channels_are_chosen_by_their_columns_of_the_embedding():
    teacher = make("llama_biases")
    squares = teacher.model.embed_tokens.weight.detach().double().square().sum(0)
    channels = choose_channels(teacher, list(teacher.model.layers), 12)
    assert channels.kept.tolist() == sorted(squares.topk(12).indices.tolist())
    assert channels.shares == pytest.approx([float(squares.topk(12).values.sum() / squares.sum())] * 7)


# ---- training ----


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_narrower_student_built_from_a_spec_has_adapters_and_heads(adapter, head, tmp_path):
    folder = tiny.save_folder(tmp_path, tiny.make_tokenizer(), hidden=32)
    model: Any = build(ModelSpec(name=str(folder), adapter=adapter, head=head, shrink=Shrink(hidden_size=16)))
    made = model(input_ids=IDS).logits
    assert made.shape == ((1, 1) if head == "scalar" else (1, IDS.shape[1], model.config.vocab_size))
    made.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)


def test_distillation_trains_a_narrower_student_and_matches_its_hidden_states(tmp_path):
    from ptl.models.teachers import Teacher
    from ptl.objectives.distillation import HiddenMatch

    kd.make_folder(tmp_path)
    teacher = str(tmp_path / "teacher")
    objective, data = kd.build(str(tmp_path), lr=0.2)
    objective.spec = ModelSpec(name=teacher, shrink=Shrink(layers=2, hidden_size=24))
    objective.teacher = Teacher(model=ModelSpec(name=teacher))
    objective.hidden = HiddenMatch(layers=[1, 2])
    losses: list[float] = []
    plain = objective.loss

    def kept(batch: Any) -> Any:
        output = plain(batch)
        losses.append(float(output.total.detach() / output.weight))
        return output

    objective.loss = kept
    law.trainer_of(str(tmp_path), "auto", 1, 8, max_epochs=4).fit(objective, datamodule=data)
    assert objective.projections["1"].weight.shape == (48, 24)
    assert len(losses) == 4 * 8 * law.STEPS
    epoch = len(losses) // 4
    assert sum(losses[-epoch:]) < 0.9 * sum(losses[:epoch])


def test_ptl_synth_student_keeps_channels(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTL_CACHE", str(tmp_path / "cache"))
    law.make_folder(tmp_path)
    argv = ["student", "model", "--layers", "2", "--hidden-size"]
    assert main([*argv, "20", "--data", "rows.jsonl", "--out", "small"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert (model.config.hidden_size, model.config.head_dim) == (20, 8)
    for size, told in (
        ("40", "hidden_size is 40, but the model has 32"),
        ("0", "hidden_size must be 1 or more, got 0"),
    ):
        assert main([*argv, size, "--out", "x"]) == 2
        err = capsys.readouterr().err
        assert told in err and "Traceback" not in err and not (tmp_path / "x").exists()


# ---- refusals ----


def scaled(family: str) -> Any:
    """A model whose first norm adds 1 to its weight, under the name of one that does not."""
    model = make(family)

    def forward(states: torch.Tensor) -> torch.Tensor:
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True)) * (1 + model.model.norm.weight)

    model.model.norm.forward = forward
    return model


@pytest.mark.parametrize(
    ("teacher", "size", "words"),
    [
        (lambda: make("llama_tied"), 33, "policy.shrink.hidden_size is 33, but the model has 32: give 1 to 32"),
        (lambda: make("llama_tied"), 21, r"LlamaConfig refuses the sizes .*\(21\) is not a multiple .*heads \(4\)"),
        (lambda: make("Phi"), 16, r"PhiForCausalLM has model.layers.0.self_attn.dense, whose sides are not known"),
        (lambda: make("Phi3"), 16, "has model.layers.0.self_attn.qkv_proj, whose sides are not known"),
        (
            lambda: make("Olmo2"),
            16,
            "post_feedforward_layernorm, whose sides are not known; expected a decoder made as",
        ),
        (lambda: make("Gemma2", query_pre_attn_scalar=8), 16, "pre_feedforward_layernorm, whose sides are not known"),
        (lambda: make("Gemma"), 16, "GemmaForCausalLM has no plain model.embed_tokens; expected a decoder made as"),
        (lambda: make("StableLm"), 16, r"something else than w \* x / rms\(x\) in model.layers.0.input_layernorm"),
        (lambda: scaled("llama_tied"), 16, r"something else than w \* x / rms\(x\) in model.norm"),
        (lambda: make("Qwen3Moe", num_experts=2, num_experts_per_tok=1), 16, "mlp.* sides are not known"),
        (lambda: zoo.make("gpt2", "eager"), 16, "GPT2LMHeadModel has no list of layers that can be cut"),
        (lambda: add_lora(make("llama_tied"), LoRA(rank=2)), 16, "made of a plain model, got PeftModel"),
    ],
)
def test_a_stream_that_cannot_be_cut_is_refused(teacher, size, words):
    with pytest.raises(ValueError, match=words) as refusal:
        make_student(teacher(), Shrink(hidden_size=size))
    assert "policy.shrink" in str(refusal.value) or "PeftModel" in str(refusal.value)


def test_a_width_below_1_or_of_codes_is_refused():
    with pytest.raises(ValueError, match="policy.shrink.hidden_size must be 1 or more, got 0"):
        Shrink(hidden_size=0)
    with pytest.raises(
        ValueError, match="policy.shrink.hidden_size cuts rows of matrices, and quantize nf4 keeps codes"
    ):
        ModelSpec(name="m", adapter=LoRA(), quantize="nf4", shrink=Shrink(hidden_size=8))
