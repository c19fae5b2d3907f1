"""Adapters: what trains and what does not, rows and ties, merging, and the base underneath."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from ptl.models.adapters import adapter_disabled, base_model, load_adapter, merged_state
from ptl.models.build import load_base
from ptl.models.export import export, largest_logit_change
from ptl.models.merge import ADAPTER, MergedLayer, merge
from ptl.models.spec import LoRA, ModelSpec
from tests import tiny

DOCUMENTS = [[5, 9, 20, 33, 41, 7], [100, 101, 3, 11]]
ROWS = [3, 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("bases")
    return {tie: tiny.save_folder(root / str(tie), tokenizer, tie=tie, seed=3) for tie in (True, False)}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tie(request):
    return request.param


def spec(folders, tie, **adapter) -> ModelSpec:
    torch.manual_seed(0)
    return ModelSpec(name=str(folders[tie]), attention="sdpa", adapter=LoRA(rank=4, **adapter))


def train(model, steps=3, lr=0.02):
    """SGD on two documents, on everything that is trainable."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)
    for _ in range(steps):
        for ids in DOCUMENTS:
            x = torch.tensor([ids])
            logits = model(input_ids=x, use_cache=False).logits.float()
            torch.nn.functional.cross_entropy(logits[0, :-1], x[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# ---- what trains ----


@pytest.mark.parametrize("dora", [False, True])
def test_law_5_the_frozen_base_gets_no_gradient_and_does_not_move(dora, folders, tie):
    model = spec(folders, tie, dora=dora, train_tokens=list(ROWS)).build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([DOCUMENTS[0]])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    adapter = ("lora_", "trainable_tokens_delta")
    for name, p in model.named_parameters():
        assert p.requires_grad == any(part in name for part in adapter), name
        assert (p.grad is not None) == p.requires_grad, name
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(any(part in name for part in adapter) for name in moved)


def test_all_linear_leaves_the_head_alone(folders, tie):
    model = spec(folders, tie).build()
    adapted = {
        name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A." in name
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_excluded_modules_get_no_adapter(folders):
    model = spec(folders, True, exclude=["mlp.down_proj"]).build()
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert not any("down_proj" in name for name in names) and any("up_proj" in name for name in names)


def test_trap_sft_13_the_magnitude_is_fp32_on_a_bf16_base(folders):
    model = ModelSpec(name=str(folders[True]), dtype="bf16", attention="sdpa", adapter=LoRA(rank=4, dora=True)).build()
    kinds = {
        ("magnitude" if "magnitude" in n else "ab"): p.dtype for n, p in model.named_parameters() if p.requires_grad
    }
    assert kinds == {"magnitude": torch.float32, "ab": torch.bfloat16}
    # A step of 1e-3 at a magnitude of about 1 would be lost in bf16.
    magnitude = next(p for n, p in model.named_parameters() if "magnitude" in n)
    before = magnitude.detach().clone()
    with torch.no_grad():
        magnitude += 1e-3 * magnitude
    assert not torch.equal(before.bfloat16().float() + 0, magnitude) and (magnitude > before).all()
    ids = torch.tensor([DOCUMENTS[0]])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert magnitude.grad is not None


# ---- rows and ties ----


def test_trap_sft_10_trained_rows_replace_those_of_another_base(folders, tie, tokenizer, tmp_path):
    """The base is made again with other values in the trained rows, as a base resized with another seed would have."""
    chosen = spec(folders, tie, train_tokens=list(ROWS))
    model = train(chosen.build())
    export(model, tokenizer, tmp_path / "adapter", merged=False, spec=chosen)
    fresh = AutoModelForCausalLM.from_pretrained(folders[tie])
    with torch.no_grad():
        for matrix in {id(m.weight): m.weight for m in (fresh.get_input_embeddings(), fresh.lm_head)}.values():
            matrix[ROWS] = torch.randn(len(ROWS), matrix.shape[1], generator=torch.Generator().manual_seed(9))
    assert largest_logit_change(model, fresh, DOCUMENTS) > 0.1
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert largest_logit_change(model, again, DOCUMENTS) == 0.0


def test_trap_sft_10_a_row_adapter_holds_rows_and_not_matrices(folders, tie, tokenizer, tmp_path):
    from safetensors.torch import load_file

    chosen = spec(folders, tie, train_tokens=list(ROWS))
    export(chosen.build(), tokenizer, tmp_path / "adapter", merged=False, spec=chosen)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = {name: tuple(tensor.shape) for name, tensor in saved.items() if "lora_" not in name}
    assert set(rows.values()) == {(len(ROWS), 32)} and len(rows) == (1 if tie else 2)


@pytest.mark.parametrize("named", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_trap_sft_11_a_tied_matrix_trained_whole_stays_one(named, folders, tokenizer, tmp_path):
    chosen = spec(folders, True, save_modules=named)
    model = train(chosen.build())
    export(model, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings
    assert largest_logit_change(model, merged, DOCUMENTS) < 1e-5
    assert not torch.equal(merged.lm_head.weight, AutoModelForCausalLM.from_pretrained(folders[True]).lm_head.weight)
    export(model, tokenizer, tmp_path / "adapter", merged=False, spec=chosen)
    again = load_adapter(AutoModelForCausalLM.from_pretrained(folders[True]), tmp_path / "adapter")
    assert largest_logit_change(model, again, DOCUMENTS) == 0.0


def test_rows_are_named_by_token_too(folders):
    by_name, by_id = (spec(folders, True, train_tokens=[token]).build() for token in ("<|im_end|>", 1))
    for model in (by_name, by_id):
        assert merged_rows(model) == [1]


def merged_rows(model) -> list[int]:
    return base_model(model).get_input_embeddings().token_adapter.token_indices[ADAPTER]


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"targets": ["q_prj"]}, "no module is called 'q_prj'; linear layers are down_proj"),
        ({"exclude": ["nothing"]}, "adapter.exclude: no module is called 'nothing'"),
        ({"save_modules": ["head"]}, "adapter.save_modules: no module is called 'head'"),
        ({"targets": ["q_proj", "lm_head"]}, "share one matrix"),
        ({"targets": ["embed_tokens"]}, "share one matrix"),
        ({"train_tokens": [99999]}, "holds id 99999, but the embedding has 366 rows"),
        ({"train_tokens": ["<SEARCH-TOOL>"]}, "has no token '<SEARCH-TOOL>'"),
        ({"train_tokens": [3], "save_modules": ["embed_tokens"]}, "keep one of the two"),
        ({"init": "pissa", "rank": 64}, "adapter.rank of at most 16"),
    ],
)
def test_an_adapter_the_model_cannot_take_is_refused(adapter, words, folders):
    with pytest.raises(ValueError, match=words):
        ModelSpec(name=str(folders[True]), attention="sdpa", adapter=LoRA(**{"rank": 4, **adapter})).build()


# ---- the base under the adapter ----


def test_the_disabled_adapter_is_the_base(folders, tie):
    model = train(spec(folders, tie, train_tokens=list(ROWS)).build())
    base = AutoModelForCausalLM.from_pretrained(folders[tie])
    with adapter_disabled(model):
        assert largest_logit_change(model, base, DOCUMENTS) == 0.0
    assert largest_logit_change(model, base, DOCUMENTS) > 1e-3


def test_an_adapter_that_changed_its_base_is_no_reference(folders):
    with (
        pytest.raises(ValueError, match="pissa changes the base"),
        adapter_disabled(spec(folders, True, init="pissa").build()),
    ):
        pass
    with pytest.raises(ValueError, match="without an adapter"), adapter_disabled(torch.nn.Linear(1, 1)):
        pass


# ---- merging ----


def random_adapter(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 5]}],
    ids=str,
)
def test_merging_state_dicts_agrees_with_peft(options, tie):
    """peft's own merge changes modules in place; ours works on tensors. Both must give the same weights."""
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = random_adapter(get_peft_model(tiny.make_model(tie=tie), config))
    ours = merged_state(model, model.state_dict())
    expected = model.merge_and_unload().state_dict()
    for name, tensor in expected.items():
        if tie and name == "lm_head.weight":
            continue  # written once, as the embedding
        assert torch.allclose(ours[name], tensor, atol=1e-6), name


def test_merging_a_transposed_layer_and_an_embedding():
    """GPT-2 keeps its matrices as [in, out]; an embedding's adapter is transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=64, tie_word_embeddings=False)
    targets = ["c_attn", "c_fc", "wte"]
    adapter = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = random_adapter(get_peft_model(GPT2LMHeadModel(config), adapter))
    plain = GPT2LMHeadModel(config)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    assert largest_logit_change(model, plain, [[3, 9, 27]]) < 1e-5


def test_a_missing_base_weight_is_named():
    state = {"base_model.model.a.lora_A.default.weight": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="lacks the base weight a.weight"):
        merge(state, layers={"a": MergedLayer(scale=1.0)}, rows={})


def test_merging_leaves_the_live_model_as_it_was(folders, tokenizer, tmp_path):
    model = train(spec(folders, False, dora=True, train_tokens=list(ROWS)).build())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tokenizer, tmp_path / "merged")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pickled_adapters_are_refused(folders, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapters"):
        load_adapter(load_base(ModelSpec(name=str(folders[True]), attention="sdpa")), tmp_path)


def test_an_adapter_of_another_model_is_refused_in_one_line(folders, tokenizer, tmp_path):
    chosen = spec(folders, True)
    export(chosen.build(), tokenizer, tmp_path / "adapter", merged=False, spec=chosen)
    with pytest.raises(ValueError, match="does not fit its base model") as refusal:
        load_adapter(tiny.make_model(366, hidden=64), tmp_path / "adapter")
    assert "\n" not in str(refusal.value)
