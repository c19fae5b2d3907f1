"""Answers to many prompts at a time, the same whatever they share a batch with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptl.models.heads import causal_lm


@torch.no_grad()  # not inference_mode: what a model caches inside must serve training too
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    stop: Sequence[int],
    limits: Sequence[int],
    vocab: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """The ids that follow each prompt, with the one that ends it where one came within the limit.

    Prompts are padded on the left and share a key-value cache; those that have ended leave it. Every setting is this
    function's, none the checkpoint's. What is drawn depends on the seed and the prompt's number alone.

    Args:
        model: a causal language model in eval mode, whole on this rank, with or without an adapter.
        prompts: ids, none empty.
        numbers: of each prompt, for its draws.
        stop: ids that end an answer.
        limits: most new ids of each, 1 or more.
        vocab: ids that may be written; the table may have more rows.
        temperature: 0 takes the likeliest id.
        seed: of the draws.
    """
    if not prompts:
        return []
    lm: Any = causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    longest = max(len(prompt) for prompt in prompts)
    pad = stop[0] if stop else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    u = None
    if temperature:
        u = torch.stack([uniforms(seed, number, max(limits), 1)[:, 0] for number in numbers]).to(device)
    written: list[list[int]] = [[] for _ in prompts]
    alive, cache = list(range(len(prompts))), None
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    positioned = "position_ids" in inspect.signature(lm.forward).parameters
    for step in range(max(limits)):
        out = lm(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **({"position_ids": positions} if positioned else {}),
        )
        cache = out.past_key_values
        chosen = _choose(out.logits[:, -1, :vocab].float(), temperature, None if u is None else u[alive, step])
        for row, token in zip(alive, chosen.tolist()):
            written[row].append(token)
        left = [i for i, row in enumerate(alive) if written[row][-1] not in stop and step + 1 < limits[row]]
        if not left:
            break
        if len(left) < len(alive):
            index = torch.tensor(left, device=device)
            cache.batch_select_indices(index)
            mask, positions, chosen = mask[index], positions[index], chosen[index]
            alive = [alive[i] for i in left]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return written


def _choose(logits: Tensor, temperature: float, u: Tensor | None) -> Tensor:
    if u is None:
        return logits.argmax(-1)
    return draw(torch.log_softmax(logits / temperature, -1), u[:, None])[:, 0]


def greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, stop: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """``generate`` at temperature 0: the likeliest next token, again and again."""
    rows = causal_lm(model).get_input_embeddings().weight.shape[0]
    limits = [max_new_tokens] * len(prompts)
    return generate(model, prompts, range(len(prompts)), stop=stop, limits=limits, vocab=rows, temperature=0.0, seed=0)


def uniforms(seed: int, row: int, tokens: int, draws: int) -> Tensor:
    """float64 [tokens, draws] in [0, 1) that depend on the seed and the row alone: not on batch, rank or device."""
    generator = np.random.Generator(np.random.Philox(key=[seed, row]))
    return torch.from_numpy(generator.random((tokens, draws)))


def draw(logp: Tensor, u: Tensor) -> Tensor:
    """Ids [N, n] drawn with replacement from log-probabilities [N, V], by inverting the distribution function at ``u``.

    In float64, so that the sum over a large vocabulary favours no id; an id of probability 0 is never drawn.
    """
    cdf = logp.double().exp().cumsum(-1)
    total = cdf[:, -1:]
    at = torch.minimum(u.to(cdf.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, at, right=True).clamp_max(logp.shape[-1] - 1)
