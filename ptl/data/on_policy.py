"""Batches whose answers the student wrote itself (GKD, arXiv:2306.13649)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ptl.data.batches import collate_tokens
from ptl.models.modes import evaluating
from ptl.rollout.sampling import generate, numbered
from ptl.strategies.partition import gathered_forward
from ptl.types import TokenBatch

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from ptl.data.module import ChatDataModule


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Which steps are on policy, and how the student is sampled.

    Whether a step is on policy is a function of (seed, step), so all ranks and all micro-batches of a step agree
    without asking each other; an answer is a function of (seed, step, row), so it does not depend on how the step is
    cut into ranks and micro-batches.

    Attributes:
        share: share of the steps, in (0, 1].
        max_new_tokens: longest answer.
        temperature: of the sampling, above 0.
        seed: of the choice of steps and of the sampling.

    Raises:
        ValueError: a value out of its range.
    """

    share: float = 0.5
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"on_policy.share must be above 0 and at most 1, got {self.share}")
        if self.max_new_tokens < 1:
            raise ValueError(f"on_policy.max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"on_policy.temperature must be above 0, got {self.temperature}")

    def takes(self, step: int) -> bool:
        """Whether the optimizer step is on policy."""
        return numbered(self.seed, step) / 2**63 < self.share


def rewritten(
    policy: nn.Module,
    batch: TokenBatch,
    settings: OnPolicy,
    *,
    step: int,
    data: ChatDataModule,
    strategy: Strategy,
    vocabulary: int,
) -> TokenBatch:
    """The batch with the last trained answer of each document written anew by the student.

    A document keeps the loss weight that it was planned with, spread evenly over the sampled tokens: the weight of the
    window, known before anything is sampled, stays right, and a long answer counts no more than the one in the data. A
    document without trained tokens, or without room for an answer, stays as it is.
    """
    host = batch.on("cpu")
    rows = _rows_of(host)
    asked = [row for row in rows if row["weight"] > 0 and row["start"] < data.max_length]
    answers: list[list[int]] = []
    with gathered_forward(strategy), evaluating(policy):
        if asked:
            answers = generate(
                policy,
                [row["ids"][: row["start"]].tolist() for row in asked],
                [row["row"] for row in asked],
                stop=data.renderer.terminators,
                limits=[min(settings.max_new_tokens, data.max_length - row["start"]) for row in asked],
                vocab=vocabulary,
                temperature=settings.temperature,
                seed=numbered(settings.seed, step),
            )
    for row, answer in zip(asked, answers, strict=True):
        row["ids"] = np.concatenate([row["ids"][: row["start"]], np.array(answer, np.int64)])
        row["spans"] = [row["start"], len(row["ids"])]
        row["span_weights"] = [row["weight"] / len(answer)]
    pad = data.renderer.tokenizer.pad_token_id
    fresh = collate_tokens(
        rows, layout=data.layout, pad_id=pad if isinstance(pad, int) else 0, window_weight=float(host.window_weight)
    )
    return fresh.on(batch.input_ids.device)


def _rows_of(batch: TokenBatch) -> list[dict[str, Any]]:
    """The documents of a batch on the CPU, with where their last trained answer starts."""
    owner, ids, mask = (t.flatten().numpy() for t in (batch.document_ids, batch.input_ids, batch.loss_mask))
    rows = []
    for document, source in enumerate(batch.sources.tolist()):
        here = owner == document
        weights = mask[here]
        trained = np.flatnonzero(weights)
        start = 0
        if len(trained):
            breaks = np.flatnonzero(np.diff(trained) > 1)
            start = int(trained[breaks[-1] + 1] if len(breaks) else trained[0])
        spans = [at for t in trained for at in (t, t + 1)]
        rows.append(
            {
                "ids": ids[here],
                "spans": spans,
                "span_weights": weights[trained].tolist(),
                "weight": float(weights.sum(dtype=np.float64)),
                "start": start,
                "source": source,
                "row": int(batch.rows[document]) if batch.rows is not None else document,
            }
        )
    return rows
