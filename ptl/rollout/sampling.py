"""Answers to many prompts at a time, the same whatever they share a batch with."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ptl.models.compiled import not_compiled
from ptl.models.heads import causal_lm
from ptl.rollout.decoding import NextLogits, make_room

BLOCK = 256
"""Ids whose probabilities are added up before one of them is drawn."""


class Sampled(NamedTuple):
    """An answer as it was drawn.

    Attributes:
        ids: with the one that ended it, where one came within the limit.
        logprobs: of each id, by ``log_softmax(z / scored_at)`` over the ids that may be written, before top-p, so that
            a plain forward pass gives the same numbers; empty where an engine does not know them.
    """

    ids: list[int]
    logprobs: list[float]


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
    how = {"stop": stop, "limits": limits, "vocab": vocab, "temperature": temperature, "seed": seed}
    with not_compiled(model):
        return _write(model, prompts, numbers, **how, top_p=1.0, samples=1, scored_at=None)[0]


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    samples: int,
    stop: Sequence[int],
    limits: Sequence[int],
    vocab: int,
    temperature: float,
    top_p: float,
    seed: int,
    scored_at: float = 1.0,
) -> list[list[Sampled]]:
    """Several answers to each prompt, with their log-probabilities; a prompt is read once, whatever their number.

    What is drawn depends on the seed, the prompt's number and the answer's place among the prompt's own; the first is
    what ``generate`` draws.

    Args:
        model, prompts, numbers, stop, limits, vocab, seed: as in ``generate``.
        samples: answers to each prompt, K.
        temperature: of ``softmax(z / T)``, which is drawn from; 0 takes the likeliest id.
        top_p: in (0, 1]: draws come from the likeliest ids alone, as few as together have this probability.
        scored_at: temperature of the log-probabilities, above 0.

    Returns:
        K answers for each prompt.
    """
    how = {"stop": stop, "limits": limits, "vocab": vocab, "temperature": temperature, "top_p": top_p, "seed": seed}
    with not_compiled(model):
        written, logprobs = _write(model, prompts, numbers, **how, samples=samples, scored_at=scored_at)
    answers = [Sampled(*pair) for pair in zip(written, logprobs)]
    return [answers[begin : begin + samples] for begin in range(0, len(answers), samples)]


@torch.no_grad()  # not inference_mode: what a model caches inside must serve training too
def _write(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    stop: Sequence[int],
    limits: Sequence[int],
    vocab: int,
    temperature: float,
    top_p: float,
    seed: int,
    samples: int,
    scored_at: float | None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Ids and, with ``scored_at``, log-probabilities of ``samples`` answers to each prompt, in this order."""
    if not prompts:
        return [], []
    lm: Any = causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    ids, mask = _padded(prompts, device)
    u = None
    if temperature:
        named = [(number, place) for number in numbers for place in range(samples)]
        u = torch.stack([uniforms(seed, number, max(limits), 1, place)[:, 0] for number, place in named]).to(device)
    count = len(prompts) * samples
    written: list[list[int]] = [[] for _ in range(count)]
    logprobs: list[list[float]] = [[] for _ in range(count)]
    alive, cache = list(range(count)), None
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    positioned = "position_ids" in inspect.signature(lm.forward).parameters
    forward = NextLogits(model)
    for step in range(max(limits)):
        inputs = {"position_ids": positions} if positioned else {}
        logits, cache = forward(input_ids=ids, attention_mask=mask, past_key_values=cache, **inputs)
        logits = logits[:, :vocab].float()
        if step == 0 and samples > 1:
            logits = logits.repeat_interleave(samples, 0)
        chosen, logp = _choose(logits, temperature, top_p, None if u is None else u[alive, step])
        for row, token in zip(alive, chosen.tolist()):
            written[row].append(token)
        if scored_at is not None:
            if logp is None or scored_at != temperature:
                logp = torch.log_softmax(_over(logits, scored_at), -1)
            for row, value in zip(alive, logp.gather(-1, chosen[:, None])[:, 0].tolist()):
                logprobs[row].append(value)
        left = [i for i, row in enumerate(alive) if written[row][-1] not in stop and step + 1 < limits[row // samples]]
        if not left:
            break
        # A prompt's row of the cache serves all its answers: after the first step it is taken once for each of them.
        rows = [i // samples for i in left] if step == 0 else left
        if rows != list(range(len(mask))):
            index = torch.tensor(rows, device=device)
            cache.batch_select_indices(index)
            mask, positions = mask[index], positions[index]
        if step == 0:
            make_room(cache, max(limits) - 1)
        if len(left) < len(alive):
            chosen, alive = chosen[torch.tensor(left, device=device)], [alive[i] for i in left]
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return written, logprobs


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, T], of prompts that are padded on the left with id 0, which every model has."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def _choose(logits: Tensor, temperature: float, top_p: float, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Ids [N], and the log-probabilities [N, V] at the temperature where they were needed for that."""
    if u is None:
        return logits.argmax(-1), None
    logp = torch.log_softmax(_over(logits, temperature), -1)
    return draw_one((logp if top_p == 1 else nucleus(logp, top_p)).exp(), u), logp


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probabilities [N, V] with -inf for all but the likeliest ids, as few as together reach ``top_p``.

    The id that crosses the bound is kept; of equals the lower id comes first. What is kept does not sum to 1:
    ``draw`` needs no more than proportions.
    """
    ranked, order = logp.double().exp().sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    return logp.masked_fill(torch.zeros_like(logp, dtype=torch.bool).scatter(-1, order, before >= top_p), -torch.inf)


def greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, stop: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """``generate`` at temperature 0: the likeliest next token, again and again."""
    rows = causal_lm(model).get_input_embeddings().weight.shape[0]
    limits = [max_new_tokens] * len(prompts)
    return generate(model, prompts, range(len(prompts)), stop=stop, limits=limits, vocab=rows, temperature=0.0, seed=0)


def uniforms(seed: int, row: int, tokens: int, draws: int, stream: int = 0) -> Tensor:
    """float64 [tokens, draws] in [0, 1) that depend on seed, row and stream alone: not on batch, rank or device.

    Streams of a row are 2**128 numbers apart, so they never overlap.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, row], counter=[0, 0, stream, 0]))
    return torch.from_numpy(generator.random((tokens, draws)))


def draw(logp: Tensor, u: Tensor) -> Tensor:
    """Ids [N, n] drawn with replacement from log-probabilities [N, V], by inverting the distribution function at ``u``.

    In float64, so that the sum over a large vocabulary favours no id; an id of probability 0 is never drawn.
    """
    cdf = logp.double().exp().cumsum(-1)
    total = cdf[:, -1:]
    at = torch.minimum(u.to(cdf.device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, at, right=True).clamp_max(logp.shape[-1] - 1)


def draw_one(p: Tensor, u: Tensor) -> Tensor:
    """``draw`` of one id a row, int64 [N], from what is proportional to probabilities [N, V], at ``u`` float64 [N].

    First the block of ids is found, then the id in it, so that only the sums of blocks are float64 and not V of them.
    Of NaN some id comes, for the caller to find that its probability is no number.
    """
    width = p.shape[-1]
    p = pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    block, rest = _inverted(p.sum(-1), u[:, None].to(p.device))
    inside = p.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    place, _ = _inverted(inside, rest)
    return (block * BLOCK + place)[:, 0].clamp_max(width - 1)


def _inverted(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Where the distribution function of p [N, C] passes the share u [N, 1] of its total, and the share of that entry
    that lies below."""
    cdf = p.double().cumsum(-1)
    total = cdf[:, -1:]
    at = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cdf, at, right=True).clamp_max(p.shape[-1] - 1)
    own = p.gather(1, found).double()
    return found, ((at - cdf.gather(1, found) + own) / own).clamp(0.0, 1.0)


def numbered(*numbers: int) -> int:
    """A seed in [0, 2**63), a function of the numbers alone."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
