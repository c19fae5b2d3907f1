"""Small made-up rollouts and a loop that any reader can check."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ptl.functional.policy_loss import PolicyTokens
from ptl.functional.policy_weights import FORMS, tokens_of_groups

LENGTHS = [3, 1, 5, 2, 4, 0, 6, 2]
"""Sampled tokens of each sequence; one is empty."""
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])


class Rollout(NamedTuple):
    tokens: PolicyTokens
    groups: torch.Tensor


def rollout(seed=0, *, drift=0.4, lengths=LENGTHS, groups=GROUPS):
    """Tokens of ragged sequences in float64, some of them a tool's, one sequence all masked."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    n = len(owners)

    def noise():
        return torch.randn(n, dtype=torch.float64, generator=generator)

    old = -1 - noise().abs()
    mask = torch.rand(n, generator=generator) > 0.25
    mask[owners == 3] = False
    mask[owners == 1] = True
    tokens = PolicyTokens(
        logprobs=(old + drift * noise()).requires_grad_(),
        old=old,
        advantages=torch.randn(len(lengths), dtype=torch.float64, generator=generator)[owners],
        mask=mask,
        owners=owners,
        sequences=len(lengths),
        reference=old + 0.3 * noise(),
        entropy=noise().abs(),
        group_tokens=tokens_of_groups(mask, owners, groups),
    )
    return Rollout(tokens, groups)


def taken(tokens: PolicyTokens, chosen) -> PolicyTokens:
    """The micro-batch of some sequences of a window, numbered anew."""
    chosen = torch.as_tensor(chosen, dtype=torch.int64)
    number = torch.full((tokens.sequences,), -1)
    number[chosen] = torch.arange(len(chosen))
    keep = (number[tokens.owners] >= 0).nonzero()[:, 0]
    cut = {
        name: value[keep]
        for name, value in tokens._asdict().items()
        if isinstance(value, torch.Tensor) and name != "group_tokens"
    }
    cut |= {"owners": number[tokens.owners[keep]], "group_tokens": tokens.group_tokens[chosen]}
    return tokens._replace(**cut, sequences=len(chosen))


def slow_loss(kind, rollout: Rollout, *, low, high, dual=None, constant=None, kl=0.0, entropy=0.0):
    """The loss of the whole window, sequence by sequence and token by token."""
    t, form = rollout.tokens, FORMS[kind]
    sequences = [[n for n in range(len(t.owners)) if t.owners[n] == s and t.mask[n]] for s in range(t.sequences)]
    present = [s for s, tokens in enumerate(sequences) if tokens]
    all_tokens = sum(len(tokens) for tokens in sequences)
    total = torch.zeros((), dtype=torch.float64)
    for s in present:
        logs = [t.logprobs[n] - t.old[n] for n in sequences[s]]
        for n, log in zip(sequences[s], logs):
            if form.ratio == "mean":
                log = sum(logs) / len(logs)
            elif form.ratio == "sum":
                log = sum(logs)
            w, a = log.exp(), float(t.advantages[n])
            bounded = min(max(w.item(), 1 - low), 1 + high)
            if form.surrogate == "cispo":
                loss = -bounded * a * t.logprobs[n]
            else:
                moves = w.item() * a <= bounded * a
                loss = -w * a if moves else torch.tensor(-bounded * a, dtype=torch.float64)
                if dual and a < 0 and loss.item() > -dual * a:
                    loss = torch.tensor(-dual * a, dtype=torch.float64)
            if kl:
                k1, r = t.logprobs[n] - t.reference[n], (t.logprobs[n] - t.old[n]).exp()
                loss = loss + kl * r * (torch.exp(-k1) + k1 - 1)
            loss = loss - entropy * t.entropy[n]
            group = [m for m in range(t.sequences) if rollout.groups[m] == rollout.groups[s]]
            share = {
                "token": 1 / all_tokens,
                "sequence": 1 / len(sequences[s]) / len(present),
                "constant": 1 / (constant or math.nan) / len(present),
                "group": 1 / sum(len(sequences[m]) for m in group) / len({int(rollout.groups[m]) for m in present}),
            }[form.weighing]
            total = total + share * loss
    return total
