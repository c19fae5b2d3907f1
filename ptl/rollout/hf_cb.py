"""The engine that draws with transformers' continuous batching: the policy itself, a paged cache and no padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from ptl.models.compiled import not_compiled
from ptl.models.heads import causal_lm
from ptl.models.modes import evaluating
from ptl.rollout.engine import Abilities, Asked, Draw, Draws, Engine
from ptl.rollout.sampling import Sampled, numbered
from ptl.strategies.partition import gathered_forward

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

PAGE = 32
"""Tokens of a page of the cache; with flash attention it is transformers' own number, which its kernels need."""
CPU_CACHE_TOKENS = 65_536
CPU_BATCH_TOKENS = 512


class HFContinuous(Engine):
    """Draws from the policy itself, in this process: an answer that ends makes room for the next at once.

    A prompt is read once for all its answers. It pays where a flash-attention kernel is installed and set
    (``policy.attention: flash_attention_2``), since only then transformers records graphs of its steps; elsewhere the
    session computes with ``sdpa`` and ``ptl.rollout.hf.HF`` is faster. Under ZeRO-3 the whole policy is gathered on
    every rank while it draws. With ``top_p`` below 1 the log-probabilities are not
    known and left out.

    Arguments:
        cache_tokens: tokens whose keys and values are kept at a time; None is what a GPU has room for, and on a CPU
            what is asked, at most 65,536.
        batch_tokens: most tokens of a forward pass; None is transformers' choice on a GPU, and 512 on a CPU.

    Raises:
        ValueError: a number is not above 0.
    """

    abilities = Abilities(logprobs=True, zero3=True, quantized=False, reproducible=False)

    def __init__(self, *, cache_tokens: int | None = None, batch_tokens: int | None = None) -> None:
        for name, number in (("cache_tokens", cache_tokens), ("batch_tokens", batch_tokens)):
            if number is not None and number < 1:
                raise ValueError(f"model.engine.{name} must be 1 or more, got {number}")
        self.cache_tokens, self.batch_tokens = cache_tokens, batch_tokens

    @contextmanager
    def session(self, policy: nn.Module, strategy: Strategy, version: int) -> Iterator[Draw]:
        with gathered_forward(strategy), evaluating(policy), not_compiled(policy), _paged_attention(causal_lm(policy)):
            yield partial(self._draw, policy)

    def _draw(self, policy: nn.Module, asked: Sequence[Asked], draws: Draws) -> list[list[Sampled]]:
        if not asked:
            return []
        lm = causal_lm(policy)
        # A manager of its own for each call: one that is kept would answer from keys and values of older weights.
        # It seeds torch's global generator, which is put back.
        with (
            torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []),
            lm.continuous_batching_context_manager(
                generation_config=generation_config(draws),
                continuous_batching_config=self._batching(lm, asked, draws),
            ) as manager,
        ):
            stop = list(draws.stop) or [-1]
            samples = draws.samples if draws.temperature else 1  # the likeliest answer is one
            names = [manager.add_request(list(a.ids), max_new_tokens=a.limit, eos_token_id=stop) for a in asked]
            found: dict[str, Any] = {}
            while len(found) < len(asked) * samples:
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    found[output.request_id] = output
                elif output is None and not manager.is_running():
                    break
        failed = [output.error for output in found.values() if output.error]
        if failed or len(found) < len(asked) * samples:
            raise RuntimeError(
                f"continuous batching answered {len(found) - len(failed)} of {len(asked) * samples}: "
                f"{failed[0] if failed else 'its thread ended'}. Raise model.engine.cache_tokens, or set model.engine "
                "to ptl.rollout.hf.HF"
            )
        copies = draws.samples // samples
        return [[_sampled(found[name], draws) for name in _family(parent, samples)] * copies for parent in names]

    def _batching(self, lm: Any, asked: Sequence[Asked], draws: Draws) -> ContinuousBatchingConfig:
        flash = "flash" in lm.config._attn_implementation
        page = ContinuousBatchingConfig.page_size if flash else PAGE
        tokens, batch = self.cache_tokens, self.batch_tokens
        if lm.device.type == "cpu":
            pages = sum(math.ceil((len(a.ids) + a.limit) / page) + 1 for a in asked) * draws.samples
            tokens = tokens or min(pages * page, CPU_CACHE_TOKENS)
            batch = batch or CPU_BATCH_TOKENS
        return ContinuousBatchingConfig(
            page_size=page,
            num_blocks=None if tokens is None else math.ceil(tokens / page),
            max_batch_tokens=batch,
            return_logprobs=True,
            auto_switch_to_flash=False,
            seed=numbered(draws.seed, *(a.number for a in asked)) >> 1,
        )


@contextmanager
def _paged_attention(lm: Any) -> Iterator[None]:
    """An attention that continuous batching can use, and afterwards the model's own.

    Raises:
        ValueError: none computes what this model needs.
    """
    own = lm.config._attn_implementation
    if "flash" in own:
        yield
        return
    config = lm.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"{type(lm).__name__} caps its attention scores, which continuous batching leaves out without flash "
            "attention: set policy.attention to flash_attention_2, or model.engine to ptl.rollout.hf.HF"
        )
    sinks = any(hasattr(module, "sinks") for module in lm.modules())
    lm.set_attn_implementation("paged|eager" if sinks else "sdpa")
    try:
        yield
    finally:
        lm.set_attn_implementation(own)


def generation_config(draws: Draws) -> GenerationConfig:
    """Every setting that could change a draw, so that nothing is filled in from a model's own configuration."""
    drawn = draws.temperature > 0
    return GenerationConfig(
        do_sample=drawn,
        temperature=draws.temperature if drawn else 1.0,
        top_p=draws.top_p if drawn else 1.0,
        top_k=0,
        min_p=None,
        top_h=None,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        min_length=0,
        min_new_tokens=None,
        bad_words_ids=None,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        sequence_bias=None,
        guidance_scale=None,
        exponential_decay_length_penalty=None,
        watermarking_config=None,
        num_beams=1,
        num_return_sequences=draws.samples if drawn else 1,
        eos_token_id=list(draws.stop) or -1,
    )


def _family(parent: str, samples: int) -> list[str]:
    """Names of a prompt's answers: the one that read it, and those that go on from its cache."""
    return [parent, *(f"{parent}__child#{place}" for place in range(samples - 1))]


def _sampled(output: Any, draws: Draws) -> Sampled:
    ids = list(output.generated_tokens)
    return Sampled(ids, list(output.logprobs) if draws.top_p == 1 else [])
