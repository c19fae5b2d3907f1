"""Sizes read from a config against the model that transformers builds from it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ptl.functional.model_size import model_size

SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA_LIKE = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 176}
CONFIGS = {
    "llama": {**LLAMA_LIKE, "model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {**LLAMA_LIKE, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**LLAMA_LIKE, "model_type": "mistral", "tie_word_embeddings": False, "head_dim": 32},
    "qwen2": {**LLAMA_LIKE, "model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": {**LLAMA_LIKE, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "mixtral": {
        **LLAMA_LIKE,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_built_model(name):
    config = dict(CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    found = model_size(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    # The matrices of the layers, to the entry: what QLoRA packs and what is multiplied.
    layers = [
        p.numel()
        for key, p in model.named_parameters()
        if p.dim() >= 2 and ".layers." in key and "gate.weight" not in key
    ]
    if name != "gpt2":
        assert found.linear == sum(layers)


def test_lora_parameters_are_those_of_peft():
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS["llama"]))
        adapted = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear"))
    assert model_size(CONFIGS["llama"]).lora(5) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_published_sizes():
    llama = {"model_type": "llama", "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    found = model_size(
        {
            **llama,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "tie_word_embeddings": False,
        }
    )
    assert found.parameters == 70_553_706_496  # Llama-3.1-70B, as its weights on the hub sum up to


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is 'many'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"kv_lora_rank": 64}, "latent"),
    ],
)
def test_what_is_missing_is_named(change, told):
    with pytest.raises(ValueError, match=told):
        model_size({**CONFIGS["llama"], **change})
