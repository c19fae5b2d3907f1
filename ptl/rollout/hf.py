"""The engine that draws from the very module that trains: no copy of the weights, any quantisation, any adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ptl.models.heads import causal_lm
from ptl.models.modes import evaluating
from ptl.rollout.engine import Abilities, Asked, Draw, Draws, Engine
from ptl.rollout.sampling import Sampled, sample
from ptl.strategies.partition import gathered_forward

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class HF(Engine):
    """Draws from the policy itself, in this process.

    Prompts are sorted by length and answered together, a prompt is read once for all its answers, and answers that have
    ended leave the batch. Under ZeRO-3 the whole policy is gathered on every rank while it draws.

    Arguments:
        batch_tokens: most tokens that are kept at a time, prompts with room for all their answers: what bounds the
            memory of keys and values. One prompt may have more.

    Raises:
        ValueError: ``batch_tokens`` is not above 0.
    """

    abilities = Abilities(logprobs=True, zero3=True, quantized=True, reproducible=True)

    def __init__(self, *, batch_tokens: int = 131_072) -> None:
        if batch_tokens < 1:
            raise ValueError(f"model.engine.batch_tokens must be 1 or more, got {batch_tokens}")
        self.batch_tokens = batch_tokens

    @contextmanager
    def session(self, policy: nn.Module, strategy: Strategy, version: int) -> Iterator[Draw]:
        try:
            # The trainer's autocast, so that what is sampled is computed as what is trained.
            precision = strategy.precision_plugin.val_step_context()
            with gathered_forward(strategy), evaluating(policy), precision:
                yield partial(self._draw, policy)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                "there is no memory left to draw answers in this process: lower model.engine.batch_tokens "
                f"(now {self.batch_tokens}); where ZeRO-3 cannot gather the whole policy on one device, set "
                "model.engine to ptl.rollout.vllm.VLLM"
            ) from error

    def _draw(self, policy: nn.Module, asked: Sequence[Asked], draws: Draws) -> list[list[Sampled]]:
        vocab = causal_lm(policy).get_input_embeddings().weight.shape[0]
        answers: dict[int, list[Sampled]] = {}
        for places in self._batches(asked, draws.samples):
            drawn = sample(
                policy,
                [asked[place].ids for place in places],
                [asked[place].number for place in places],
                samples=draws.samples,
                stop=draws.stop,
                limits=[asked[place].limit for place in places],
                vocab=vocab,
                temperature=draws.temperature,
                top_p=draws.top_p,
                seed=draws.seed,
                scored_at=draws.temperature or 1.0,
            )
            answers.update(zip(places, drawn))
        return [answers[place] for place in range(len(asked))]

    def _batches(self, asked: Sequence[Asked], samples: int) -> Iterator[list[int]]:
        """Places of the prompts, longest first, as many at a time as ``batch_tokens`` lets."""
        order = sorted(range(len(asked)), key=lambda place: (-len(asked[place].ids), place))
        batch: list[int] = []
        width = 0
        for place in order:
            wider = max(width, len(asked[place].ids) + asked[place].limit)
            if batch and samples * wider * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch, wider = [], len(asked[place].ids) + asked[place].limit
            batch, width = [*batch, place], wider
        if batch:
            yield batch
