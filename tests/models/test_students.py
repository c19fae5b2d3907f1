"""Students made of their teachers: which layers, neurons and heads stay, and that what stays works as it did."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ptl.models.adapters import add_lora
from ptl.models.build import build
from ptl.models.export import export, largest_logit_change
from ptl.models.importance import activity, choose_layers, layer_importance
from ptl.models.spec import LoRA, ModelSpec, Shrink
from ptl.models.students import kept_layers, make_student
from tests import tiny
from tests.models import zoo
from tests.models.student_parts import IDS, batches, logits, teacher
from tests.ranks import run_ranks

DEPTH = 5
KEPT = [0, 2, 3]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_untied": ("Llama", {"tie_word_embeddings": False}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_no_head_dim": ("Llama", {"head_dim": None}),
    "qwen2_sliding": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "smollm3_some_rope": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def make(family: str, *, depth: int = DEPTH, seed: int = 0) -> Any:
    """A model of 4 heads in 2 key-value groups and 48 neurons, in eval mode."""
    prefix, options = FAMILIES.get(family, (family, {}))
    shape = {**zoo.SHAPE, "num_hidden_layers": depth, **options}
    if "layer_types" in options:
        shape["layer_types"] = (options["layer_types"] * depth)[:depth]
    return teacher(prefix, shape, seed)


def reloaded(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return again.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher")
    return tiny.save_folder(root, tiny.make_tokenizer(), seed=3, layers=4, hidden=128)


# ---- which layers ----


@pytest.mark.parametrize(
    ("layers", "keep", "depth", "expected"),
    [
        (1, "uniform", 6, [0]),
        (2, "uniform", 6, [0, 5]),
        (3, "uniform", 6, [0, 3, 5]),
        (4, "uniform", 7, [0, 2, 4, 6]),
        (7, "uniform", 30, [0, 5, 10, 15, 19, 24, 29]),
        (6, "uniform", 6, [0, 1, 2, 3, 4, 5]),
        (2, "first", 6, [0, 1]),
        (2, "last", 6, [4, 5]),
        (6, "last", 6, [0, 1, 2, 3, 4, 5]),
        (1, "ends", 6, [0]),
        (3, "ends", 6, [0, 1, 5]),
        (4, "ends", 6, [0, 1, 4, 5]),
        (6, "ends", 6, [0, 1, 2, 3, 4, 5]),
        ([1, 4], "uniform", 6, [1, 4]),
    ],
)
def test_the_layers_that_are_kept(layers, keep, depth, expected):
    assert kept_layers(Shrink(layers=layers, keep=keep), depth) == expected


def test_uniform_layers_are_distinct_and_hold_both_ends():
    for depth in range(2, 41):
        for count in range(2, depth + 1):
            kept = kept_layers(Shrink(layers=count), depth)
            assert len(set(kept)) == count and kept == sorted(kept) and (kept[0], kept[-1]) == (0, depth - 1)
            gaps = [b - a for a, b in pairwise(kept)]
            assert max(gaps) - min(gaps) <= 1
    assert kept_layers(Shrink(heads=2), 3) == [0, 1, 2]


def test_layers_of_the_highest_scores_are_chosen():
    assert choose_layers([0.5, 0.1, 0.3, 0.2], 2) == [0, 2]
    assert choose_layers([0.1, 0.2, 0.1, 0.3], 3) == [0, 1, 3]
    with pytest.raises(ValueError, match="cannot keep 3 layers of 2: give 1 to 2"):
        choose_layers([0.1, 0.2], 3)
    with pytest.raises(ValueError, match="layer 1 is nan"):
        choose_layers([0.1, float("nan")], 1)


# ---- depth ----


@pytest.mark.parametrize("family", FAMILIES)
def test_law_9_a_student_of_some_layers_is_its_teacher_without_the_others(family, tmp_path):
    teacher = make(family)
    before = copy.deepcopy(teacher)
    student: Any = make_student(teacher, Shrink(layers=KEPT))
    for new, old in enumerate(KEPT):
        ours, theirs = student.model.layers[new].state_dict(), before.model.layers[old].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert student.model.layers[new].self_attn.layer_idx == new
    for index in set(range(DEPTH)) - set(KEPT):
        before.model.layers[index].register_forward_hook(lambda module, args, output: args[0])
    torch.testing.assert_close(logits(student), logits(before), rtol=0, atol=0)
    again = reloaded(student, tmp_path)
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)
    assert again.config.num_hidden_layers == len(KEPT)
    kinds = getattr(before.config, "layer_types", None)
    assert kinds is None or again.config.layer_types == [kinds[i] for i in KEPT]
    tied = before.config.tie_word_embeddings
    for model in (student, again):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kept", [KEPT, [3, 4], [0, 2, 4]], ids=str)
@pytest.mark.parametrize("family", ["llama_tied", "qwen2_sliding", "gemma2", "gemma3", "smollm3_some_rope"])
def test_a_student_generates_the_same_with_and_without_a_cache(family, kept):
    student: Any = make_student(make(family), Shrink(layers=kept, heads=2, intermediate_size=40))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None}
    one, other = (student.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(one.sequences, other.sequences) and one.sequences.shape[1] == IDS.shape[1] + 12
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(other.logits), rtol=1e-4, atol=1e-4)


# ---- width ----


@pytest.mark.parametrize("measured", [False, True], ids=["weights", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_and_groups_that_do_nothing_are_the_ones_to_go(family, measured, tmp_path):
    teacher = make(family, depth=3)
    dim, dead = teacher.model.layers[0].self_attn.head_dim, [[1, 7, 30], [0, 2, 47], [9, 10, 11]]
    for layer, neurons in zip(teacher.model.layers, dead):
        group = neurons[0] % 2  # of 2, each with 2 query heads
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, neurons] = 0
            layer.self_attn.o_proj.weight[:, group * 2 * dim : (group + 1) * 2 * dim] = 0
    expected = logits(teacher)
    read = batches() if measured else None
    student: Any = make_student(teacher, Shrink(intermediate_size=45, heads=2), batches=read)
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)
    attention = student.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (2 * dim, 32) and attention.k_proj.weight.shape == (dim, 32)
    assert student.model.layers[2].mlp.up_proj.weight.shape == (45, 32)
    assert all(p.requires_grad for p in student.parameters())
    torch.testing.assert_close(logits(reloaded(student, tmp_path)), logits(student), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama_tied", "gemma2"])
def test_a_student_that_keeps_everything_is_its_teacher(family):
    expected = logits(make(family))
    student = make_student(make(family), Shrink(layers=DEPTH, intermediate_size=48, heads=4))
    torch.testing.assert_close(logits(student), expected, rtol=0, atol=0)


def test_neurons_are_ranked_the_same_when_a_factor_moves_between_matrices():
    def kept(factor: float) -> torch.Tensor:
        model = make("llama_tied", depth=1)
        marks = torch.arange(48.0)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[::2] *= factor
            model.model.layers[0].mlp.down_proj.weight[:, ::2] /= factor
            model.model.layers[0].mlp.gate_proj.weight[:, 0] = marks * 1e-6
        student: Any = make_student(model, Shrink(intermediate_size=20))
        return (student.model.layers[0].mlp.gate_proj.weight[:, 0] * 1e6).round()

    assert torch.equal(kept(1.0), kept(64.0))


def test_heads_are_scored_by_the_product_of_their_output_and_value_matrices():
    for seed in range(4):
        teacher = make("llama_tied", depth=1, seed=seed)
        attention = copy.deepcopy(teacher.model.layers[0].self_attn)
        scores = []
        for group in range(2):
            value = attention.v_proj.weight.double()[group * 8 : group * 8 + 8]
            heads = [attention.o_proj.weight.double()[:, h * 8 : h * 8 + 8] for h in (2 * group, 2 * group + 1)]
            scores.append(sum((out @ value).pow(2).sum().item() for out in heads))
        best = scores.index(max(scores))
        student: Any = make_student(teacher, Shrink(heads=2))
        new = student.model.layers[0].self_attn
        assert torch.equal(new.k_proj.weight, attention.k_proj.weight[best * 8 : best * 8 + 8])
        assert torch.equal(new.q_proj.weight, attention.q_proj.weight[best * 16 : best * 16 + 16])
        assert torch.equal(new.o_proj.weight, attention.o_proj.weight[:, best * 16 : best * 16 + 16])


def test_neurons_that_real_tokens_do_not_wake_go_though_their_weights_are_large():
    teacher = make("llama_biases", depth=2)
    asleep = [4, 17, 40]
    for layer in teacher.model.layers:
        with torch.no_grad():
            layer.mlp.gate_proj.bias[asleep] = -60.0  # silu is 0 to 16 digits there
            layer.mlp.up_proj.weight[asleep] *= 100
            layer.mlp.down_proj.weight[:, asleep] *= 1000
    expected = logits(teacher)
    by_tokens = make_student(copy.deepcopy(teacher), Shrink(intermediate_size=45), batches=batches())
    torch.testing.assert_close(logits(by_tokens), expected, rtol=1e-5, atol=1e-5)
    by_weights = make_student(teacher, Shrink(intermediate_size=45))
    assert (logits(by_weights) - expected).abs().max() > 0.01


def test_activity_is_the_mean_square_over_real_tokens_in_any_layout():
    teacher = make("llama_tied", depth=2)
    teacher.set_attn_implementation("ptl_packed")
    docs = zoo.documents((7, 3, 9))
    expected: list[torch.Tensor] = []
    down = teacher.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: expected.append(args[0][0].double()))
    with torch.no_grad():
        for ids, _ in docs:
            teacher(input_ids=ids[None], use_cache=False)
    handle.remove()
    for read in ([zoo.padded(docs)], [zoo.packed(docs)], [zoo.packed(docs[:1]), zoo.padded(docs[1:])]):
        found = activity(teacher, list(teacher.model.layers), read)
        assert len(found) == 4
        torch.testing.assert_close(found[down], torch.cat(expected).square().mean(0), rtol=1e-5, atol=1e-7)


# ---- importance of layers ----


def test_a_layer_that_does_nothing_has_no_importance_and_is_dropped():
    teacher = make("llama_tied").train()
    layer = teacher.model.layers[2]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    scores = layer_importance(teacher, batches())
    assert teacher.training and not layer._forward_hooks
    assert scores[2] < 1e-6 and min(scores[:2] + scores[3:]) > 1e-3
    kept = choose_layers(scores, 4)
    assert kept == [0, 1, 3, 4]
    expected = logits(teacher.eval())
    torch.testing.assert_close(logits(make_student(teacher, Shrink(layers=kept))), expected, rtol=0, atol=1e-6)


def test_importance_counts_each_real_token_once_however_the_batches_are_cut():
    teacher = make("llama_tied")
    teacher.set_attn_implementation("ptl_packed")
    docs = zoo.documents((7, 3, 9))
    sums, tokens = torch.zeros(DEPTH, dtype=torch.float64), 0
    states: list[torch.Tensor] = []
    handles = [x.register_forward_hook(lambda m, a, out: states.extend((a[0], out))) for x in teacher.model.layers]
    for ids, _ in docs:
        states.clear()
        with torch.no_grad():
            teacher(input_ids=ids[None], use_cache=False)
        for index in range(DEPTH):
            before, after = states[2 * index][0].double(), states[2 * index + 1][0].double()
            cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
            sums[index] += (1 - cosine).sum()
        tokens += len(ids)
    for handle in handles:
        handle.remove()
    for read in ([zoo.padded(docs)], [zoo.packed(docs)], [zoo.packed(docs[:1]), zoo.padded(docs[1:])]):
        assert layer_importance(teacher, read) == pytest.approx((sums / tokens).tolist(), rel=1e-4)
    with pytest.raises(ValueError, match="no tokens to measure"):
        layer_importance(teacher, [])


# ---- specs ----


@pytest.mark.parametrize(
    ("adapter", "quantize"),
    [(None, None), (LoRA(rank=4), None), (LoRA(rank=4), "nf4"), (LoRA(rank=4), "int8")],
    ids=["full", "lora", "nf4", "int8"],
)
def test_law_9_a_student_built_from_a_spec_trains_and_is_exported(adapter, quantize, folder, tmp_path):
    tokenizer = tiny.make_tokenizer()
    spec = ModelSpec(name=str(folder), adapter=adapter, quantize=quantize, shrink=Shrink(layers=2))
    model = build(spec)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    again = AutoModelForCausalLM.from_pretrained(export(model, tokenizer, tmp_path / "out"))
    assert again.config.num_hidden_layers == 2
    # In int8 the activations are rounded too, which what is exported does without.
    assert largest_logit_change(model, again, [IDS[0].tolist()]) < (0.05 if quantize == "int8" else 1e-4)
    if adapter is not None:
        with pytest.raises(ValueError, match="random_init, config_overrides or shrink"):
            export(model, tokenizer, tmp_path / "adapter", merged=False, spec=spec)


def test_a_scalar_head_sits_on_a_student_too(folder):
    model: Any = build(ModelSpec(name=str(folder), head="scalar", shrink=Shrink(layers=3, heads=2)))
    assert model(input_ids=IDS).logits.shape == (1, 1) and len(model.model.layers) == 3


BASE = ModelSpec(name="m", adapter=LoRA())


@pytest.mark.parametrize(
    ("make_it", "words"),
    [
        (lambda: Shrink(), "policy.shrink is empty: set its layers, hidden_size, intermediate_size or heads"),
        (lambda: Shrink(layers=0), "policy.shrink.layers must be 1 or more, got 0"),
        (lambda: Shrink(layers=[]), "policy.shrink.layers must be a number, or a list"),
        (lambda: Shrink(layers=[2, 1]), r"ascending order, got \[2, 1\]"),
        (lambda: Shrink(layers=[1, 1]), r"each once and in ascending order, got \[1, 1\]"),
        (lambda: Shrink(layers=[-1, 1]), "counted from 0"),
        (lambda: Shrink(layers=2, keep="middle"), "policy.shrink.keep must be one of uniform, first, last, ends"),  # pyright: ignore
        (lambda: Shrink(intermediate_size=0), "policy.shrink.intermediate_size must be 1 or more, got 0"),
        (lambda: Shrink(heads=-2), "policy.shrink.heads must be 1 or more, got -2"),
        (lambda: replace(BASE, shrink=Shrink(layers=2), random_init=True), "remove random_init, or give the sizes in"),
        (lambda: replace(BASE, shrink=Shrink(heads=2), quantize="nf4"), "policy.shrink.heads cuts rows of matrices"),
    ],
)
def test_a_shrink_that_makes_no_sense_is_refused(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it()


@pytest.mark.parametrize(
    ("family", "shrink", "words"),
    [
        ("llama_tied", Shrink(layers=6), "policy.shrink.layers is 6, but the model has 5 layers: give 1 to 5"),
        ("llama_tied", Shrink(layers=[1, 5]), "layers holds 5, but the model's layers are 0 to 4"),
        ("llama_tied", Shrink(intermediate_size=49), "intermediate_size is 49, but the model has 48: give 1 to 48"),
        ("llama_tied", Shrink(heads=3), "heads is 3, but the model has 4 heads in key-value groups of 2"),
        ("llama_tied", Shrink(heads=6), "give a multiple of 2 up to 4"),
        ("Phi", Shrink(intermediate_size=8), "the layers of PhiForCausalLM have no gate_proj"),
        ("Phi3", Shrink(heads=2), "the layers of Phi3ForCausalLM have no q_proj"),
        ("Olmo2", Shrink(heads=2), "cannot describe this student .*q_norm"),
    ],
)
def test_a_student_that_cannot_be_made_is_refused(family, shrink, words):
    with pytest.raises(ValueError, match=words):
        make_student(make(family), shrink)


def test_layers_that_the_configuration_cannot_name_are_refused():
    """Every second layer of this model is a mixture of experts, by a rule on its number."""
    rule = {"decoder_sparse_step": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    shape: dict[str, Any] = {**zoo.SHAPE, "num_hidden_layers": 4, **rule}

    def mixture() -> Any:
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape))

    with pytest.raises(ValueError, match="cannot describe this student"):
        make_student(mixture(), Shrink(layers=[1, 2]))
    assert make_student(mixture(), Shrink(layers=[2, 3])).config.num_hidden_layers == 2


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list of layers that can be cut"):
        make_student(zoo.make("gpt2", "eager"), Shrink(layers=1))
    with pytest.raises(ValueError, match="made of a plain model, got PeftModel"):
        make_student(add_lora(make("llama_tied"), LoRA(rank=2)), Shrink(layers=1))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, folder):
    out = tmp_path_factory.mktemp("students")
    arguments = {"folder": str(folder), "out": str(out)}
    return run_ranks("tests.models.zero_students:compare", world_size=2, args=arguments, timeout=200)


@pytest.mark.parametrize("kind", ["layers", "adapter", "width", "channels"])
def test_a_student_made_under_zero_3_learns_as_one_made_alone(kind, on_two_ranks):
    for result in (ranks[kind] for ranks in on_two_ranks):
        assert result["losses"] == pytest.approx(result["expected"], rel=1e-5)
        assert (result["sharded"] > 0) == (kind != "channels")  # of which every matrix is cut, and so made whole
    assert on_two_ranks[0][kind]["export"] < 1e-4


def test_importance_of_a_sharded_model_is_refused(on_two_ranks):
    assert all("sharded by ZeRO-3: make the student in one process" in ranks["refusal"] for ranks in on_two_ranks)
