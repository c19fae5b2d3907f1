"""Building, adapting, quantising and exporting models: traps 9 to 13 of the SFT page, and law 9."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptl.models.adapters import is_adapted, load_adapter
from ptl.models.export import export, largest_logit_change
from ptl.models.spec import LoRA, ModelSpec
from tests import tiny
from tests.ranks import run_ranks

DOCUMENTS = [[5, 9, 20, 33, 41, 7], [100, 101, 102, 11]]
ROWS = [3, 8]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Tiny models of 128 columns, which 4-bit weights need on the CPU."""
    root = tmp_path_factory.mktemp("models")
    return {tie: tiny.save_folder(root / str(tie), tokenizer, tie=tie, hidden=128, seed=3) for tie in (True, False)}


def train(model, steps: int = 4, lr: float = 0.002) -> list[float]:
    """A few SGD steps on two documents; returns the losses."""
    losses = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        total = 0.0
        for ids in DOCUMENTS:
            x = torch.tensor([ids])
            logits = model(input_ids=x, use_cache=False).logits.float()
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], x[0, 1:])
        total.backward()
        with torch.no_grad():
            for p in trained:
                assert p.grad is not None
                p -= lr * p.grad
                p.grad = None
        losses.append(total.item())
    return losses


def reload(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)


def test_trap_scale_0_4_a_built_model_is_in_training_mode(folders):
    model = ModelSpec(name=str(folders[True]), gradient_checkpointing=True).build()
    assert model.training and all(m.training for m in model.modules())
    assert not model.config.use_cache
    train(model, 1)


def test_trap_sft_9_building_never_resizes_and_keeps_ties(folders):
    for tie, folder in folders.items():
        model = ModelSpec(name=str(folder)).build()
        plain = reload(folder)
        assert model.get_input_embeddings().weight.shape == plain.get_input_embeddings().weight.shape
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie
        assert largest_logit_change(model, plain, DOCUMENTS) < 1e-5


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
def test_trap_scale_0_3_an_adapter_starts_where_its_base_is(init, folders):
    model = ModelSpec(name=str(folders[True]), adapter=LoRA(rank=4, init=init)).build()
    assert is_adapted(model)
    assert largest_logit_change(model, reload(folders[True]), DOCUMENTS) < 2e-5


ADAPTERS = {
    "plain": LoRA(rank=4),
    "rslora": LoRA(rank=4, rslora=True),
    "dora": LoRA(rank=4, dora=True),
    "pissa": LoRA(rank=4, init="pissa"),
    "olora": LoRA(rank=4, init="olora"),
    "some layers": LoRA(rank=4, targets=["q_proj", "down_proj"]),
    "token rows": LoRA(rank=4, train_tokens=list(ROWS)),
}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_law_9_what_is_exported_loads_elsewhere_to_the_same_logits(kind, tie, folders, tokenizer, tmp_path):
    spec = ModelSpec(name=str(folders[tie]), adapter=ADAPTERS[kind])
    torch.manual_seed(0)
    model = spec.build()
    losses = train(model, lr=0.01)
    assert losses[-1] < losses[0]
    export(model, tokenizer, tmp_path / "merged", generation_eos=[1])
    merged = reload(tmp_path / "merged")
    assert largest_logit_change(model, merged, DOCUMENTS) < 1e-4
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tie
    assert json.loads((tmp_path / "merged/generation_config.json").read_text())["eos_token_id"] == [1]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    export(model, tokenizer, tmp_path / "adapter", merged=False, spec=spec)
    again = load_adapter(reload(folders[tie]), tmp_path / "adapter")
    assert largest_logit_change(model, again, DOCUMENTS) < 1e-4


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_trap_sft_10_11_only_the_listed_rows_train_in_both_matrices(tie, folders, tokenizer, tmp_path):
    spec = ModelSpec(name=str(folders[tie]), adapter=LoRA(rank=4, train_tokens=list(ROWS)))
    model = spec.build()
    train(model)
    export(model, tokenizer, tmp_path / "merged")
    before, after = reload(folders[tie]), reload(tmp_path / "merged")
    for pick in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, pick)().weight, getattr(after, pick)().weight
        changed = (old != new).any(1).nonzero()[:, 0].tolist()
        # Row 3 and 8 need not occur in the documents for the head to learn of them; the input rows must occur.
        assert set(changed) <= set(ROWS)
        if pick == "get_output_embeddings":
            assert changed == ROWS


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trap_sft_12_a_quantised_base_trains_and_merges_onto_what_it_was_trained_on(kind, folders, tokenizer, tmp_path):
    spec = ModelSpec(name=str(folders[True]), quantize=kind, adapter=LoRA(rank=4))
    try:
        model = spec.build()
    except ValueError as refusal:
        assert kind == "int8" and "int8" in str(refusal)
        return
    losses = train(model, 6)
    assert losses[-1] < losses[0]
    export(model, tokenizer, tmp_path / "merged", dtype="fp32")
    merged = reload(tmp_path / "merged")
    onto_original = load_adapter_onto_original(model, spec, folders[True], tokenizer, tmp_path)
    close, far = (largest_logit_change(model, other, DOCUMENTS) for other in (merged, onto_original))
    assert close < (1e-3 if kind == "nf4" else 0.05) and close < far


def load_adapter_onto_original(model, spec, base, tokenizer, tmp_path):
    export(model, tokenizer, tmp_path / "adapter", merged=False, spec=spec)
    return load_adapter(reload(base), tmp_path / "adapter")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "expected"),
    [("bf16", "auto", torch.bfloat16), ("bf16", "fp32", torch.float32), ("fp32", "auto", torch.float32)],
)
def test_trap_sft_13_adapter_dtypes_and_gradients(dtype, adapter_dtype, expected, checkpointing, folders):
    spec = ModelSpec(
        name=str(folders[True]),
        dtype=dtype,
        adapter=LoRA(rank=4, dtype=adapter_dtype, init="gaussian"),
        gradient_checkpointing=checkpointing,
    )
    model = spec.build()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        train(model, 1)  # asserts that every adapter matrix has a gradient


def test_pickled_weights_are_refused_unless_asked(folders, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(folders[True], folder)
    (folder / "model.safetensors").unlink()
    torch.save(reload(folders[True]).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="allow_pickle"):
        ModelSpec(name=str(folder)).build()
    ModelSpec(name=str(folder), allow_pickle=True).build()


def test_foreign_code_is_refused_unless_asked(folders, tmp_path):
    folder = tmp_path / "code"
    shutil.copytree(folders[True], folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModelSpec(name=str(folder)).build()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": " "}, "policy.name"),
        ({"name": "x", "attention": "flash_attention_2"}, "bf16"),
        ({"name": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_a_wrong_spec_names_what_to_change(arguments, words):
    with pytest.raises(ValueError, match=words):
        ModelSpec(**arguments).build()


def test_a_scalar_head_is_fp32_and_gives_one_number(folders):
    model = ModelSpec(name=str(folders[True]), head="scalar", dtype="bf16").build()
    out = model(input_ids=torch.tensor([DOCUMENTS[0]]), use_cache=False).logits
    assert out.shape == (1, 1) and out.dtype == torch.float32


def count_passes(model) -> list[int]:
    """Grows by one each time that a layer's attention runs."""
    passes: list[int] = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("adapter", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_trap_scale_0_4_gradient_checkpointing_recomputes_each_layer(adapter, folders):
    """In eval mode the library skips it without a word."""
    ids = torch.tensor([DOCUMENTS[0]])
    for on in (False, True):
        model = ModelSpec(name=str(folders[True]), adapter=adapter, gradient_checkpointing=on).build()
        passes = count_passes(model)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert len(passes) == (4 if on else 2)


def test_a_random_model_needs_no_weights(folders, tmp_path):
    shutil.copy(folders[True] / "config.json", tmp_path)
    with pytest.raises(ValueError, match="random_init: true"):
        ModelSpec(name=str(tmp_path)).build()
    model = ModelSpec(name=str(tmp_path), random_init=True, config_overrides={"num_hidden_layers": 5}).build()
    assert len(model.model.layers) == 5 and model.training and all(p.requires_grad for p in model.parameters())
    assert not torch.equal(model.lm_head.weight, reload(folders[True]).lm_head.weight)


def test_fewer_layers_are_the_first_ones_and_more_are_refused(folders):
    fewer = ModelSpec(name=str(folders[True]), config_overrides={"num_hidden_layers": 1}).build()
    whole = reload(folders[True])
    assert len(fewer.model.layers) == 1
    assert torch.equal(fewer.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="lacks 9 weights of its model, first model.layers.2"):
        ModelSpec(name=str(folders[True]), config_overrides={"num_hidden_layers": 3}).build()
    with pytest.raises(ValueError, match="no key 'num_hiden_layers'; did you mean 'num_hidden_layers'"):
        ModelSpec(name=str(folders[True]), config_overrides={"num_hiden_layers": 3}).build()


def test_the_librarys_own_class_may_be_chosen_over_foreign_code(folders, tmp_path):
    folder = tmp_path / "code"
    shutil.copytree(folders[True], folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration.Evil", "AutoModelForCausalLM": "modeling.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelSpec(name=str(folder), config_overrides={"auto_map": None}).build()
    assert largest_logit_change(model, reload(folders[True]), DOCUMENTS) < 1e-5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder, "has no config.json"),
        (lambda folder: folder / "export" / "config.json", "is a run folder: give its model"),
        (lambda folder: folder / "adapter_config.json", "is an adapter, not a model: merge it"),
    ],
    ids=["empty", "run", "adapter"],
)
def test_a_folder_that_is_no_model_is_told_apart(make, words, tmp_path):
    path = make(tmp_path)
    if path != tmp_path:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    with pytest.raises(ValueError, match=words) as refusal:
        ModelSpec(name=str(tmp_path)).build()
    assert "\n" not in str(refusal.value)


def test_a_hub_name_that_cannot_be_had_is_one_line():
    with pytest.raises(ValueError, match="cannot read the model 'nobody/nothing'") as refusal:
        ModelSpec(name="nobody/nothing").build()
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("zero3")
    base = tiny.save_folder(root / "base", tokenizer, seed=3)
    arguments = {"folder": str(base), "out": str(root / "out")}
    return run_ranks("tests.models.zero_build:compare", world_size=2, args=arguments, timeout=280)


@pytest.mark.parametrize("kind", ["full", "recomputed", "dora", "pissa", "rows", "matrix", "scalar", "nf4", "nf4 rows"])
def test_trap_scale_0_3_a_model_built_under_zero_3_learns_as_one_built_alone(kind, on_two_ranks):
    """Adapters, heads and rows are made whole after the base was sharded; made inside it, B would not start at 0."""
    for result in (ranks[kind] for ranks in on_two_ranks):
        assert result["losses"] == pytest.approx(result["expected"], rel=1e-5)
        assert not result["adapter sharded"]
        assert (result["sharded"] > 0) == (not kind.startswith("nf4"))
    assert on_two_ranks[0][kind]["export"] < 1e-4
