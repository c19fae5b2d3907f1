"""Tiny models of many architectures with weights far from zero, and batches of the same documents in both layouts."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from ptl.models.attention import NAME as PACKED
from ptl.types import TokenBatch

VOCAB = 96
LENGTHS = (5, 9, 1, 3, 7)
"""Documents both shorter and longer than ``WINDOW``, one of a single token."""
WINDOW = 4

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_untied": ("Llama", {"tie_word_embeddings": False}),
    "qwen2_half_sliding": ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "gemma2_softcaps_sliding": (
        "Gemma2",
        {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "mistral_sliding": ("Mistral", {}),
    "cohere_scale": ("Cohere", {"logit_scale": 0.25}),
    "granite_scale": ("Granite", {"logits_scaling": 4.0}),
    "gpt_neox": ("GPTNeoX", {"tie_word_embeddings": False}),
    "gpt2": ("GPT2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi_head_bias": ("Phi", {}),
}
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make(name: str, attention: str = PACKED, seed: int = 0) -> Any:
    """A model in training mode, by a key of ``MODELS`` or a class prefix of transformers."""
    prefix, config = MODELS.get(name, (name, {}))
    causal = getattr(transformers, f"{prefix}ForCausalLM", None) or getattr(transformers, f"{prefix}LMHeadModel")
    full = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **config})
    torch.manual_seed(seed)
    model = causal._from_config(full, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return model.train()


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Ids [L] and loss weights [L] of each document; weights are 0, 1 or in between, 0 at the first token."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for length in lengths:
        weights = torch.tensor([0.0, 1.0, 0.25])[torch.randint(0, 3, (length,), generator=g)]
        weights[0] = 0.0
        out.append((torch.randint(3, VOCAB, (length,), generator=g), weights))
    return out


def packed(docs: list[tuple[Tensor, Tensor]]) -> TokenBatch:
    lengths = [len(ids) for ids, _ in docs]
    return TokenBatch(
        input_ids=torch.cat([ids for ids, _ in docs])[None],
        loss_mask=torch.cat([weights for _, weights in docs])[None],
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        document_ids=torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None],
        sources=torch.zeros(len(docs), dtype=torch.int64),
        window_weight=torch.tensor(1.0, dtype=torch.float64),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    )


def padded(docs: list[tuple[Tensor, Tensor]], pad: int = 0) -> TokenBatch:
    b, t = len(docs), max(len(ids) for ids, _ in docs)
    batch = TokenBatch(
        input_ids=torch.full((b, t), pad),
        loss_mask=torch.zeros(b, t),
        position_ids=torch.zeros(b, t, dtype=torch.int64),
        document_ids=torch.full((b, t), -1),
        sources=torch.zeros(b, dtype=torch.int64),
        window_weight=torch.tensor(1.0, dtype=torch.float64),
        attention_mask=torch.zeros(b, t, dtype=torch.int64),
    )
    assert batch.attention_mask is not None
    for i, (ids, weights) in enumerate(docs):
        n = len(ids)
        batch.input_ids[i, :n], batch.loss_mask[i, :n] = ids, weights
        batch.position_ids[i, :n], batch.document_ids[i, :n] = torch.arange(n), i
        batch.attention_mask[i, :n] = 1
    return batch
