"""Does this architecture keep what the loss relies on? Measured on a few tokens of the model itself.

Two things depend on how transformers wrote a model, and fail without a word where it did not: whether packed documents
stay apart under ``sdpa`` and ``eager`` (in transformers 5.19 not for OPT, BioGPT, GPT-OSS and AFMoE, whose masks are
made without the positions), and whether ``lm_head`` knows everything that the model does to its logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptl.models.heads import causal_lm, hidden_states, lm_head
from ptl.models.modes import evaluating
from ptl.types import TokenBatch

LENGTHS = (5, 7, 4)
"""Lengths of the documents of the packed row."""


def check_model(model: nn.Module, *, packed: bool) -> None:
    """Runs the model on 16 tokens, in evaluation mode and without gradients, and compares.

    Args:
        model: a causal language model whose parameters are whole, not sharded by ZeRO-3.
        packed: documents will be packed.

    Raises:
        ValueError: packed documents see each other, or the head's logits are not the model's own.
    """
    with evaluating(model):
        error = head_error(model)
        if error > 1e-3 if next(model.parameters()).dtype == torch.float32 else error > 0.05:
            raise ValueError(
                f"{type(causal_lm(model)).__name__} changes its logits after the output head in a way that the fused "
                f"loss does not know (relative difference {error:.1e}): this architecture cannot be trained here"
            )
        leak = packing_leak(model) if packed else 0.0
        if leak > 1e-4:
            raise ValueError(
                f"{type(causal_lm(model)).__name__} with attention {causal_lm(model).config._attn_implementation!r} "
                f"lets packed documents see each other (relative change {leak:.1e}): set policy.attention to packed, "
                "or data.layout to padded"
            )


@torch.no_grad()
def packing_leak(model: nn.Module) -> float:
    """How much the hidden states of packed documents move when the document before them changes, relative to their
    largest value. Nothing but a leak moves them, so rounding needs no allowance."""
    batch = _packed_batch(model)
    first = batch.document_ids == 0
    vocab = causal_lm(model).get_input_embeddings().weight.shape[0]
    changed = torch.where(first, (batch.input_ids + vocab // 2) % vocab, batch.input_ids)
    before, after = (hidden_states(model, batch._replace(input_ids=ids)) for ids in (batch.input_ids, changed))
    rest = ~first[0]
    return float((before - after)[:, rest].abs().max() / before[:, rest].abs().max())


@torch.no_grad()
def head_error(model: nn.Module) -> float:
    """Largest difference between the model's own logits and those of ``lm_head``, relative to the largest logit."""
    batch = _packed_batch(model)
    ids = batch.input_ids[:, : LENGTHS[0]]
    alone = batch._replace(input_ids=ids, cu_seqlens=None, attention_mask=torch.ones_like(ids))
    expected: Tensor = causal_lm(model)(input_ids=ids, use_cache=False).logits.float()
    head, hidden = lm_head(model), hidden_states(model, alone)
    logits = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias)
    if head.low_rank is not None:
        logits = logits + head.low_rank[0](hidden) @ head.low_rank[1].T
    logits = logits.float() * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return float((logits - expected).abs().max() / expected.abs().max())


def _packed_batch(model: nn.Module) -> TokenBatch:
    embedding: Tensor = causal_lm(model).get_input_embeddings().weight
    device, total = embedding.device, sum(LENGTHS)
    # Spread over the vocabulary, without a random number: the run's generators must not move.
    ids = torch.arange(1, total + 1, device=device) * 7919 % embedding.shape[0]
    return TokenBatch(
        input_ids=ids[None],
        loss_mask=torch.ones(1, total, device=device),
        position_ids=torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None],
        document_ids=torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(LENGTHS)])[None],
        sources=torch.zeros(len(LENGTHS), dtype=torch.int64, device=device),
        window_weight=torch.ones((), dtype=torch.float64, device=device),
        cu_seqlens=torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32),
    )
