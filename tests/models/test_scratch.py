"""Models from scratch: a tokenizer and sizes in, the same weights on every rank and for a seed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptl.models.export import export
from ptl.models.spec import ModelSpec
from tests import tiny
from tests.ranks import run_ranks

SIZES = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(path)
    return path


def spec(folder, **keys) -> ModelSpec:
    return ModelSpec(name=str(folder), random_init=True, attention="sdpa", config_overrides={**SIZES, **keys})


def test_a_seed_gives_the_weights_and_the_tokenizer_the_rest(folder, tokenizer, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        return spec(folder).build()

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.config.vocab_size == 384 and first.config.eos_token_id == tokenizer.eos_token_id
    assert first.lm_head.weight is first.get_input_embeddings().weight
    export(first, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 9, 20]])
    assert torch.equal(first.eval()(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "model_type must say what model to begin, such as llama"),
        ({"layers": 3}, "the configuration of llama has no key 'layers'"),
        ({"vocab_size": 100}, "vocab_size is 100, but the tokenizer has 366 tokens"),
        ({"num_attention_heads": 5}, "config_overrides: "),
    ],
)
def test_sizes_that_make_no_model_are_refused(keys, words, folder):
    with pytest.raises(ValueError, match=words):
        spec(folder, **keys).build()


def test_a_tokenizer_alone_is_no_model(folder):
    with pytest.raises(ValueError, match="is a tokenizer alone: set random_init: true and config_overrides.model_type"):
        ModelSpec(name=str(folder)).build()


def test_law_1_zero_trains_a_model_from_scratch_as_one_process_does(folder, tmp_path):
    """The same first weights, losses and last weights on each rank of ZeRO-2 and ZeRO-3 as in one process."""
    results = run_ranks("tests.models.zero_scratch:stages", 2, {"folder": str(folder), "out": str(tmp_path)})
    for rank in results:
        assert rank["first"]["2"] == rank["first"]["3"] == rank["first"]["1 process"]
        for stage in ("2", "3"):
            assert rank["losses"][stage] == pytest.approx(rank["losses"]["1 process"], rel=1e-5)
    assert results[0]["first"] == results[1]["first"]
    assert all(change < 1e-5 for change in results[0]["change"].values())
