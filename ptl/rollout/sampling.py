"""Answers of a model to token prompts, drawn so that each depends on its own seed and not on what is beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ptl.models.heads import causal_lm


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to ``logits / T``: the largest of the sums is a draw from ``softmax(logits / T)``.

    One generator a row makes a draw independent of the batch, which a shared generator would not.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, vocabulary: int) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._vocabulary = temperature, vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float() / self._temperature
        scores[:, self._vocabulary :] = float("-inf")
        noise = torch.empty(self._vocabulary)
        for row, generator in enumerate(self._generators):
            scores[row, : self._vocabulary] -= noise.exponential_(generator=generator).log_().to(scores.device)
        return scores


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    stop: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    vocabulary: int,
) -> list[list[int]]:
    """Draws an answer to each prompt at a temperature, with nothing else changing the distribution.

    Every setting is this function's, none the checkpoint's, whose repetition penalties would be sampled from and never
    scored. The global random state is not used. The model should be in eval mode, and whole on this rank.

    Args:
        model: a transformers language model, plain or adapted.
        prompts: token ids, at least one each.
        seeds: one a prompt; equal seeds and prompts give equal answers in any batch, up to rounding.
        stop: ids that end an answer.
        max_new_tokens: longest answer.
        temperature: above 0.
        vocabulary: ids from here on are padding of the embedding and are never drawn.

    Returns:
        The ids of each answer, with the one that ended it.
    """
    lm: Any = causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    longest = max(len(prompt) for prompt in prompts)
    pad = stop[0] if stop else 0
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    noisy = LogitsProcessorList([_Gumbel(seeds, temperature, vocabulary)])
    with _own_settings(lm), torch.no_grad():
        out = lm.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=noisy, synced_gpus=False
        )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        answers.append(row[:end])
    return answers


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """``generate`` fills unset fields from the model's own configuration; inside it has none."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
