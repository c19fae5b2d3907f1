"""What is kept of a teacher's distribution, and what is lost with the rest.

Shape letters: N tokens, V ids of the vocabulary, k entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ptl.models.heads import Head, hidden_states, lm_head, shifted_targets
from ptl.types import TokenBatch

CHUNK_BYTES = 64 << 20
"""Bytes of float32 logits made at a time; the work on them needs a few times as much."""


class Kept(NamedTuple):
    """Of N tokens the k likeliest ids and the rest in one number.

    Attributes:
        ids: int64 [N, k].
        logprobs: float16 [N, k], highest first; -inf where nothing is.
        tail: float32 [N], log of the mass of all other ids; -inf for none.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor


def log_distributions(model: nn.Module, batch: TokenBatch, *, vocab: int, temperature: float) -> Iterator[Tensor]:
    """Log-probabilities, float32 [n, V], of the N trained tokens of a batch, chunk by chunk in their flat order.

    They are ``log_softmax(z / T)`` over the first ``vocab`` ids, of the logits z after scale and soft cap. Never
    [B, T, V]: the head runs on the positions that predict a trained token, some at a time.

    Raises:
        ValueError: the model's table has fewer rows than the vocabulary has ids.
    """
    positions, _, _ = shifted_targets(batch)
    hidden = hidden_states(model, batch).flatten(0, 1).index_select(0, positions)
    head = lm_head(model)
    if head.weight.shape[0] < vocab:
        raise ValueError(
            f"the teacher's table has {head.weight.shape[0]} rows and the tokenizer {vocab} ids: it is not the "
            "tokenizer that the teacher was trained with"
        )
    for part in hidden.split(max(1, CHUNK_BYTES // (4 * vocab))):
        yield torch.log_softmax(_logits(head, part, vocab).float() / temperature, -1)


def _logits(head: Head, hidden: Tensor, vocab: int) -> Tensor:
    z = nn.functional.linear(hidden, head.weight[:vocab], None if head.bias is None else head.bias[:vocab])
    if head.low_rank is not None:
        reduce, up = head.low_rank
        z = z + nn.functional.linear(reduce(hidden), up[:vocab])
    z = z * head.logit_scale if head.logit_scale != 1.0 else z
    return z if head.softcap is None else head.softcap * torch.tanh(z.float() / head.softcap)


def entropy(logp: Tensor) -> Tensor:
    """Entropy in nats [N] of log-probabilities [N, V]; ids of probability 0 add nothing."""
    return torch.special.entr(logp.exp()).sum(-1)


def usable(logp: Tensor) -> Tensor:
    """bool [N]: the row has no NaN. Infinite logits, or none that is finite, make NaN of the whole row."""
    return ~logp.isnan().any(-1)


def top_k(logp: Tensor, k: int) -> Kept:
    """The k likeliest ids of log-probabilities [N, V], and the exact mass of all others.

    The tail is the log-sum-exp of what is left out and not one minus what is kept, which float32 would lose.
    """
    values, ids = logp.topk(k, -1)
    tail = torch.logsumexp(logp.scatter(-1, ids, float("-inf")), -1)
    return Kept(ids, values.half(), tail)


def counted(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws [N, n] as distinct ids and counts.

    Returns:
        How many distinct ids each row has, int64 [N]; and, row after row, the ids and how often each was drawn.
    """
    ranked = np.sort(draws, -1)
    first = np.ones(ranked.shape, bool)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    starts = np.flatnonzero(first)
    counts = np.diff(starts, append=ranked.size)
    return first.sum(-1), ranked.reshape(-1)[starts], counts


def losses(logp: Tensor, ks: list[int], draws: list[int]) -> dict[str, Any]:
    """What is lost by keeping a part of the distributions p = exp(logp) [N, V]; sums over the N tokens.

    With k entries as they are stored, the best guess p_k of p that they allow spreads the tail's mass evenly:

    * ``kl``: KL(p || p_k), nats. What of it comes of rounding, the float32 softmax's and float16's, is ``rounding``.
    * ``gradient``: ||p_k - p||_2, the error of the forward KL's gradient ``q - p`` for the student's logits.
    * ``cut``: the same norm where the tail is thrown away and the head made to sum to 1.
    * ``tail``: the tail's mass.

    With n draws the gradient is right on average; ``gradient`` is the root mean square of its error,
    ``sqrt((1 - sum p^2) / n)``, and ``distinct`` the expected number of ids, ``sum 1 - (1 - p)^n``.

    Returns:
        ``topk``: k -> sums, and ``sample``: n -> sums.
    """
    from ptl.data.teacher_cache import rescaled

    p = logp.exp()
    out: dict[str, Any] = {"topk": {}, "sample": {}}
    for k in ks:
        kept = top_k(logp, k)
        stored = rescaled(kept.logprobs.float(), kept.tail)
        others = logp.shape[-1] - k
        even = kept.tail - float(np.log(max(1, others)))
        head, log_head = p.gather(-1, kept.ids), logp.gather(-1, kept.ids)
        rounding = torch.where(head > 0, head * (log_head - stored), 0.0).sum(-1)
        guess = even[:, None].expand_as(logp).scatter(-1, kept.ids, stored)
        cut = torch.zeros_like(p).scatter(-1, kept.ids, head / head.sum(-1, keepdim=True))
        out["topk"][k] = {
            "kl": torch.where(p > 0, p * (logp - guess), 0.0).sum().item(),
            "rounding": rounding.sum().item(),
            "gradient": (guess.exp() - p).norm(dim=-1).sum().item(),
            "cut": (cut - p).norm(dim=-1).sum().item(),
            "tail": kept.tail.exp().sum().item(),
        }
    for n in draws:
        out["sample"][n] = {
            "gradient": ((1 - p.square().sum(-1)).clamp_min(0) / n).sqrt().sum().item(),
            "distinct": (-torch.expm1(n * torch.log1p(-p.double().clamp_max(1 - 1e-15)))).sum().item(),
        }
    return out
