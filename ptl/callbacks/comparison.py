"""Two language models compared token by token, and what one costs: the numbers of a distillation report."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptl.functional.head import CHUNK_BYTES
from ptl.models.heads import hidden_states, lm_head, shifted_targets
from ptl.models.modes import evaluating
from ptl.rollout.sampling import greedy
from ptl.strategies.partition import full_shape, gathered, is_partitioned
from ptl.types import TokenBatch

COLUMNS = ("weight", "kl", "nll", "agreement", "correct", "teacher_nll", "teacher_correct")
"""What ``Comparison.sums`` holds, each a sum of loss weight times the token's value."""
REPEATS = 3


@dataclass(frozen=True)
class Comparison:
    """Sums over tokens, to be added over ranks before anything is divided.

    Attributes:
        sums: float64 [S, 7], a row for each data source, with the columns of ``COLUMNS``.
        against: whether a teacher was there; without one its columns are 0 and stand for nothing.
    """

    sums: Tensor
    against: bool

    def measures(self, source: int | None = None) -> dict[str, float | None]:
        """Means per unit of loss weight, over one source or all.

        Returns:
            ``weight``; ``kl`` in nats (KL(teacher || student)), ``nll`` in nats, ``perplexity``, ``agreement`` (share
            of tokens where both models hold the same token for the likeliest) and ``correct`` (where that is the
            row's own next token). None where there is no weight, or no teacher to compare with.
        """
        rows = self.sums if source is None else self.sums[source : source + 1]
        sums = dict(zip(COLUMNS, rows.sum(0).tolist(), strict=True))
        weight = sums["weight"]

        def mean(name: Any) -> float | None:
            return sums[name] / weight if weight > 0 else None

        nll = mean("nll")
        return {
            "weight": weight,
            "kl": mean("kl") if self.against else None,
            "nll": nll,
            "perplexity": None if nll is None else _exp(nll),
            "agreement": mean("agreement") if self.against else None,
            "correct": mean("correct"),
        }

    def of_teacher(self) -> Comparison:
        """The teacher compared with itself: the row of the table that the others are measured against."""
        of = {name: self.sums[:, i] for i, name in enumerate(COLUMNS)}
        own = [of["weight"], torch.zeros_like(of["kl"]), of["teacher_nll"], of["weight"], of["teacher_correct"]]
        return replace(self, sums=torch.stack([*own, of["teacher_nll"], of["teacher_correct"]], dim=1))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def compare_models(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[TokenBatch],
    vocabulary: int,
    chunk_tokens: int | None = None,
    *,
    sources: int = 1,
) -> Comparison:
    """How far a student's next-token distributions are from a teacher's, at every trained token.

    With p and q the distributions of teacher and student over the first ``vocabulary`` ids, a token adds
    ``sum_v p_v (log p_v - log q_v)``. Both come from the backbones' hidden states: logits exist for a chunk of tokens
    at a time, for no token that is not trained, and are float32 (float64 for float64 heads) from the head's product on,
    also under autocast. A token that the teacher rules out (p = 0) adds 0; one that the student alone rules out makes
    the sum infinite, which is its value.

    Args:
        student: a causal language model; put in eval mode here, and back in the mode it was in.
        teacher: the same; None measures the student alone.
        batches: packed or padded; one without trained tokens adds nothing, but runs.
        vocabulary: ids that count, the size of the tokenizer that both share: rows of a head beyond it are padding.
        chunk_tokens: tokens of a chunk; None bounds a chunk of logits by ``ptl.functional.head.CHUNK_BYTES``.
        sources: S; the batches' ``sources`` are in [0, S).

    Returns:
        Sums of this process, on the student's device.

    Raises:
        ValueError: a head has fewer rows than ``vocabulary``, or a trained token lies beyond it.
    """
    if vocabulary < 1 or (chunk_tokens is not None and chunk_tokens < 1):
        raise ValueError(f"vocabulary and chunk_tokens must be 1 or more, got {vocabulary} and {chunk_tokens}")
    device = device_of(student)
    sums = torch.zeros(sources, len(COLUMNS), dtype=torch.float64, device=device)
    models = [student] if teacher is None else [student, teacher]
    with ExitStack() as stack, torch.no_grad():
        for model in models:
            stack.enter_context(evaluating(model))
        for batch in batches:
            _add(sums, models, batch, vocabulary, chunk_tokens)
    return Comparison(sums, against=teacher is not None)


def _add(sums: Tensor, models: list[nn.Module], batch: TokenBatch, vocabulary: int, chunk_tokens: int | None) -> None:
    device = sums.device
    positions, targets, weights = shifted_targets(batch)
    if bool((targets >= vocabulary).any()):
        raise ValueError(
            f"a trained token has id {int(targets.max())}, and the models share {vocabulary} ids: set data.tokenizer "
            "to the tokenizer of the student and the teacher"
        )
    owners = batch.sources[batch.document_ids.flatten()[positions]].to(device)
    targets, weights = targets.to(device), weights.to(device, torch.float64)
    speakers = [_speaker(model, batch, positions, vocabulary) for model in models]
    size = chunk_tokens or max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
    for start in range(0, len(targets), size):
        here = slice(start, start + size)
        values = _token_values([speak(here).to(device) for speak in speakers], targets[here])
        values = torch.stack([torch.ones_like(values[0]), *values], dim=1)
        sums.index_add_(0, owners[here], values * weights[here, None])


def _token_values(logprobs: list[Tensor], targets: Tensor) -> list[Tensor]:
    """Columns of ``COLUMNS`` after the weight, float64 [n] each, from log-probabilities [n, V] of student, teacher."""
    q, p = logprobs[0], logprobs[-1]
    index = targets[:, None]
    ours, theirs = q.argmax(-1), p.argmax(-1)
    kl = p.exp() * (p - q)
    kl = kl.masked_fill_(p == -math.inf, 0.0).sum(-1)
    nll, teacher_nll = -q.gather(1, index)[:, 0], -p.gather(1, index)[:, 0]
    columns = [kl, nll, ours == theirs, ours == targets, teacher_nll, theirs == targets]
    if len(logprobs) == 1:
        columns = [column if i in (1, 3) else torch.zeros_like(nll) for i, column in enumerate(columns)]
    return [column.to(torch.float64) for column in columns]


def _speaker(model: nn.Module, batch: TokenBatch, positions: Tensor, vocabulary: int) -> Callable[[slice], Tensor]:
    """A function from a slice of the chosen tokens to the model's log-probabilities of them, [n, vocabulary]."""
    device = device_of(model)
    hidden = hidden_states(model, batch.on(device)).flatten(0, 1).index_select(0, positions.to(device))
    head = lm_head(model)
    rows = full_shape(head.weight)[0]
    if rows < vocabulary:
        raise ValueError(
            f"{type(model).__name__} has an output head of {rows} rows, and the tokenizer {vocabulary} ids: compare "
            "models of one tokenizer"
        )
    dtype = torch.promote_types(head.weight.dtype, torch.float32)
    # A shard is whole inside alone, so what is taken out of it there is a copy.
    with gathered([t for t in (head.weight, head.bias) if t is not None]):
        weight = head.weight[:vocabulary].to(dtype, copy=is_partitioned(head.weight))
        bias = None if head.bias is None else head.bias[:vocabulary].to(dtype, copy=is_partitioned(head.bias))

    def speak(here: slice) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            states = hidden[here].to(dtype)
            logits = torch.nn.functional.linear(states, weight, bias)
            if head.low_rank is not None:
                reduce, up = head.low_rank
                logits += reduce(states).to(dtype) @ up[:vocabulary].to(dtype).t()
            logits *= head.logit_scale
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            return torch.log_softmax(logits, -1)

    return speak


def device_of(model: nn.Module) -> torch.device:
    """Where the model's input embedding is, and so where its token ids must be."""
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return embedding.weight.device


# ---- cost ----


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights as it holds them: tied ones once, packed codes as they lie, shards as wholes."""
    return sum(full_shape(p).numel() * p.element_size() for p in model.parameters())


def is_whole(model: nn.Module) -> bool:
    """Whether no parameter is a shard, so that this process may run the model alone."""
    return all(p.shape == full_shape(p) for p in model.parameters())


def generation_speed(model: nn.Module, prompt: Sequence[int], new_tokens: int) -> float:
    """Tokens a second of greedy generation for one prompt: the median of three runs, after one that is not timed.

    Args:
        model: whole, on its device.
        prompt: token ids; reading them is a part of the time.
        new_tokens: generated in each run, whatever the model says: no token ends the answer.
    """
    device = device_of(model)
    seconds = []
    with evaluating(model):
        for run in range(1 + REPEATS):
            _wait(device)
            start = time.perf_counter()
            greedy(model, [prompt], stop=(), max_new_tokens=new_tokens)
            _wait(device)
            if run:
                seconds.append(time.perf_counter() - start)
    return new_tokens / statistics.median(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
