"""What an export writes, that it is whole or absent, and what it refuses."""

import json
import stat

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from ptl.models.build import load_base
from ptl.models.export import export, largest_logit_change, whole_folder
from ptl.models.spec import LoRA, ModelSpec
from tests import tiny

DOCUMENTS = [[5, 9, 20, 33, 41, 7], [100, 101, 3, 11]]


@pytest.fixture
def model():
    return tiny.make_model(366)


def generation(folder) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


# ---- what is written ----


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_law_9_a_full_model_is_bit_equal_and_written_once(tie, tokenizer, tmp_path):
    from safetensors import safe_open

    model = tiny.make_model(366, tie=tie)
    export(model, tokenizer, tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tie)  # noqa: SIM118
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("hello world")["input_ids"]
    assert ids == tokenizer("hello world")["input_ids"]


def test_weights_are_cast_and_a_training_config_is_not_left_behind(tokenizer, tmp_path, model_folder):
    built = ModelSpec(name=str(model_folder), gradient_checkpointing=True).build()
    assert not built.config.use_cache
    export(built, tokenizer, tmp_path / "out", dtype="bf16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.config.use_cache and again.config.architectures == ["LlamaForCausalLM"]
    assert not built.config.use_cache and built.dtype == torch.float32
    assert "ptl_packed" not in (tmp_path / "out" / "config.json").read_text()


def test_trap_sft_5_every_end_of_an_answer_is_in_the_generation_config(model, tokenizer, tmp_path):
    model.generation_config.eos_token_id = 7
    export(model, tokenizer, tmp_path / "out", generation_eos=[1, 7, 9])
    assert generation(tmp_path / "out")["eos_token_id"] == [7, 1, 9]
    assert generation(tmp_path / "out")["pad_token_id"] == tokenizer.pad_token_id
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [7, 1, 9]


def test_the_tokenizers_end_is_taken_where_nothing_else_is_known(model, tokenizer, tmp_path):
    model.generation_config.eos_token_id = None
    export(model, tokenizer, tmp_path / "out")
    assert generation(tmp_path / "out")["eos_token_id"] == [tokenizer.eos_token_id]


def test_a_published_generation_config_that_cannot_be_written_is_mended(model, tokenizer, tmp_path):
    """Sampling values without do_sample load with a warning and raise when written."""
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    export(model, tokenizer, tmp_path / "out")
    assert generation(tmp_path / "out")["temperature"] == 0.6 and generation(tmp_path / "out")["do_sample"]


def test_a_scalar_head_is_written_in_fp32_and_read_back(tokenizer, tmp_path, model_folder):
    torch.manual_seed(0)
    spec = ModelSpec(name=str(model_folder), attention="sdpa", dtype="bf16", head="scalar", adapter=LoRA(rank=4))
    model = spec.build()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    export(model, tokenizer, tmp_path / "out", dtype="fp32")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.num_labels == 1 and again.score.weight.dtype == torch.float32
    # The live model adds its adapter in bf16, so its number is rounded; the merged one is not.
    assert largest_logit_change(model, again, DOCUMENTS) < 0.05
    export(model, tokenizer, tmp_path / "bf16", dtype="bf16")
    from safetensors.torch import load_file

    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "bf16" / "model.safetensors").items()}
    assert kinds.pop("score.weight") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    trained = ModelSpec(name=str(tmp_path / "out"), attention="sdpa", head="scalar").build()
    assert torch.equal(trained.score.weight, again.score.weight)


def test_others_may_read_the_files(model, tokenizer, tmp_path):
    export(model, tokenizer, tmp_path / "out")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(set(modes.values())) == 1, modes
    assert modes["model.safetensors"] == stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o666


# ---- whole or absent ----


def test_a_failed_export_leaves_nothing_and_the_earlier_one(model, tokenizer, tmp_path):
    export(model, tokenizer, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="lacks 1 weights, first model.norm.weight"):
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "model.norm.weight"}
        export(model, tokenizer, tmp_path / "out", state_dict=state)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_write_is_never_seen(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as temporary:
        (temporary / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_the_one_before_it(tokenizer, tmp_path):
    for seed in (0, 1):
        export(tiny.make_model(366, seed=seed), tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert largest_logit_change(again, tiny.make_model(366, seed=1), DOCUMENTS) == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_model_is_never_replaced(model, tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds no model"):
        export(model, tokenizer, tmp_path / "thesis")
    with pytest.raises(ValueError, match="is a file"):
        export(model, tokenizer, tmp_path / "thesis" / "chapter.tex")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


# ---- refusals ----


def test_shards_are_refused(model, tokenizer, tmp_path):
    state = model.state_dict()
    state["model.norm.weight"] = torch.empty(0)
    with pytest.raises(ValueError, match="gather every parameter"):
        export(model, tokenizer, tmp_path / "out", state_dict=state)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="tokenizer has 366 tokens but the embedding 100 rows"):
        export(tiny.make_model(100), tokenizer, tmp_path / "out")


def test_an_adapter_whose_base_exists_nowhere_is_not_saved_alone(tokenizer, tmp_path, model_folder):
    spec = ModelSpec(
        name=str(model_folder), attention="sdpa", adapter=LoRA(rank=4), config_overrides={"num_hidden_layers": 1}
    )
    model = spec.build()
    with pytest.raises(ValueError, match="would not load elsewhere"):
        export(model, tokenizer, tmp_path / "out", merged=False, spec=spec)
    export(model, tokenizer, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 1
    with pytest.raises(ValueError, match="no adapter"):
        plain = ModelSpec(name=str(model_folder), attention="sdpa")
        export(load_base(plain), tokenizer, tmp_path / "alone", merged=False, spec=plain)
