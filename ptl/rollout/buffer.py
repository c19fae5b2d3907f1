"""Answers between the moment they are sampled and the last step that trains on them.

A rank keeps the groups that it sampled, whole. Which micro-batch a group is trained in depends on the lengths of the
answers, is decided when it is asked for, and may change when a run goes on with another accumulation. What becomes
known of a token later, such as its log-probability before the first update, is kept with its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptl.data.batches import Layout
from ptl.data.groups import collate_groups
from ptl.data.order import deal_window
from ptl.functional.advantages import Baseline, Scale, advantages_of
from ptl.functional.policy_loss import PolicyLoss
from ptl.rewards.base import Completion, Outcome
from ptl.types import RolloutBatch


@dataclass
class Answer:
    """An answer that was sampled.

    Attributes:
        ids: int32 [T], with the one that ended it.
        trained: bool [T], False for what a tool wrote and for all of an answer that is left out.
        finished: it came to its end; False where it was cut at the limit.
        version: optimizer steps that had made the weights it was drawn with.
        reward: the sum of its rewards; NaN where there is none.
        outcomes: by reward.
        tokens: name -> float32 [T], see ``RolloutBatch.tokens``; NaN where a token is not trained.
        said: what the rewards were shown; None once it has been through a checkpoint.
    """

    ids: np.ndarray
    trained: np.ndarray
    finished: bool
    version: int
    reward: float = float("nan")
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    said: Completion | None = None


@dataclass
class Group:
    """A prompt and its answers.

    Attributes:
        position: of the prompt in its epoch's order.
        window: of the rollout.
        row: of the prepared data.
        source: index of the data source.
        prompt: int32 [T], ids.
        answers: K of them.
    """

    position: int
    window: int
    row: int
    source: int
    prompt: np.ndarray
    answers: list[Answer]

    @property
    def length(self) -> int:
        """Tokens that a forward pass over the group reads, the prompt once for each answer."""
        return sum(len(self.prompt) + len(answer.ids) for answer in self.answers)

    @property
    def trained(self) -> int:
        """Trained tokens of all answers."""
        return sum(int(answer.trained.sum()) for answer in self.answers)

    def rewards(self) -> Tensor:
        """float64 [K]."""
        return torch.tensor([answer.reward for answer in self.answers], dtype=torch.float64)


@dataclass(frozen=True)
class Collation:
    """How batches are laid out: as in ``collate_groups``."""

    layout: Layout
    pad_id: int
    share_prompt: bool


class Buffer:
    """The answers of one rollout on this rank.

    Args:
        epoch, start: name the rollout, as in ``Turn``.
        count: windows.
        groups: those of this rank.

    Attributes:
        weights: float64 [count], what the loss of each window is divided by, over all ranks; set once they agree.
    """

    def __init__(self, epoch: int, start: int, count: int, groups: Sequence[Group]) -> None:
        self.epoch, self.start, self.count = epoch, start, count
        self.groups = list(groups)
        self.weights = np.zeros(count)

    @property
    def key(self) -> tuple[int, int]:
        return self.epoch, self.start

    def window(self, window: int) -> list[Group]:
        """Groups of an optimizer step, in the order of their prompts."""
        return sorted((group for group in self.groups if group.window == window), key=lambda group: group.position)

    def own_weights(self, loss: PolicyLoss) -> np.ndarray:
        """This rank's part of ``weights``, float64 [count]."""
        totals = np.zeros(self.count)
        for window in range(self.count):
            groups = self.window(window)
            lengths = torch.tensor([int(answer.trained.sum()) for group in groups for answer in group.answers])
            if len(lengths):
                owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
                counts = torch.tensor([group.trained for group in groups for _ in group.answers])
                mask = torch.ones(len(owners), dtype=torch.bool)
                totals[window] = float(loss.weights(mask, owners, len(lengths), group_tokens=counts).total)
        return totals

    def set_advantages(self, baseline: Baseline, scale: Scale, batch_sums: Tensor | None) -> None:
        """Gives every token its answer's advantage; see ``advantages_of``."""
        if not self.groups:
            return
        rewards = torch.cat([group.rewards() for group in self.groups])
        counts = torch.tensor([len(group.answers) for group in self.groups])
        index = torch.repeat_interleave(torch.arange(len(self.groups)), counts)
        advantages = iter(advantages_of(rewards, index, baseline=baseline, scale=scale, batch_sums=batch_sums).tolist())
        for group in self.groups:
            for answer in group.answers:
                answer.tokens["advantages"] = np.full(len(answer.ids), next(advantages), np.float32)

    # ---- batches ----

    def members(self, window: int, micro: int, accumulate: int) -> tuple[list[Group], bool]:
        """Groups of a micro-batch, and whether they are real or only there so that every rank has a batch."""
        groups = self.window(window)
        if not groups:
            return [_nothing()], False
        size = -(-len(groups) // accumulate)
        lengths = np.array([group.length for group in groups], np.int64)
        deal = deal_window(np.arange(len(groups)), lengths, 1, accumulate, size, bucket=False)
        units, real = deal.units[micro, 0], deal.real[micro, 0]
        if real.any():
            return [groups[unit] for unit in units[real]], True
        return [_shortest(groups)], False

    def batch(self, window: int, micro: int, accumulate: int, how: Collation) -> RolloutBatch:
        """One micro-batch of a step, on the CPU."""
        groups, real = self.members(window, micro, accumulate)
        weight = float(self.weights[window])
        return collate(groups, real=real, how=how, window_weight=weight, window=window, micro=micro)

    def keep(self, window: int, micro: int, accumulate: int, name: str, values: Tensor) -> None:
        """Keeps what was computed of a micro-batch's trained tokens, [M], with their answers."""
        groups, real = self.members(window, micro, accumulate)
        if not real:
            return
        rest = values.detach().float().cpu().numpy()
        for answer in (answer for group in groups for answer in group.answers):
            count = int(answer.trained.sum())
            kept = np.full(len(answer.ids), np.nan, np.float32)
            kept[answer.trained], rest = rest[:count], rest[count:]
            answer.tokens[name] = kept

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Everything, as tensors and plain values; ``restored`` reads it."""
        return {
            **{"epoch": self.epoch, "start": self.start, "count": self.count, "weights": self.weights.tolist()},
            "groups": [
                {
                    **{name: getattr(group, name) for name in ("position", "window", "row", "source")},
                    "prompt": torch.tensor(group.prompt),
                    "answers": [
                        {
                            **{name: getattr(answer, name) for name in ("finished", "version", "reward")},
                            "ids": torch.from_numpy(answer.ids),
                            "trained": torch.from_numpy(answer.trained),
                            "tokens": {name: torch.from_numpy(of) for name, of in answer.tokens.items()},
                        }
                        for answer in group.answers
                    ],
                }
                for group in self.groups
            ],
        }

    @classmethod
    def restored(cls, states: Sequence[dict[str, Any]], positions: np.ndarray) -> Buffer:
        """The buffer of a rank out of those that all ranks had saved, with the prompts at the given positions.

        Raises:
            ValueError: a prompt is in none of them.
        """
        groups = {
            saved["position"]: Group(
                **{name: saved[name] for name in ("position", "window", "row", "source")},
                prompt=saved["prompt"].numpy(),
                answers=[
                    Answer(
                        ids=each["ids"].numpy(),
                        trained=each["trained"].numpy(),
                        tokens={name: of.numpy() for name, of in each["tokens"].items()},
                        **{name: each[name] for name in ("finished", "version", "reward")},
                    )
                    for each in saved["answers"]
                ],
            )
            for state in states
            for saved in state["groups"]
        }
        missing = [position for position in positions.tolist() if position not in groups]
        if missing:
            raise ValueError(
                f"the checkpoint holds no answers to the prompt at position {missing[0]} of the epoch's order: it was "
                "made with other data or another order; resume from a checkpoint between two rollouts"
            )
        first = states[0]
        buffer = cls(first["epoch"], first["start"], first["count"], [groups[p] for p in positions.tolist()])
        buffer.weights = np.array(first["weights"])
        return buffer


def _shortest(groups: Sequence[Group]) -> Group:
    """The cheapest group to run for nothing: the shortest answer alone."""
    group = min(groups, key=lambda group: group.length)
    return Group(group.position, group.window, group.row, group.source, group.prompt, [group.answers[0]])


def _nothing() -> Group:
    answer = Answer(np.zeros(1, np.int32), np.zeros(1, bool), True, 0)
    return Group(-1, 0, 0, 0, np.zeros(1, np.int32), [answer])


def collate(
    groups: Sequence[Group], *, real: bool, how: Collation, window_weight: float, window: int, micro: int
) -> RolloutBatch:
    """One micro-batch of groups.

    Args:
        groups: at least one.
        real: False trains nothing of them.
        how: layout.
        window_weight: what the step's loss is divided by.
        window, micro: which one it is.
    """
    rows = []
    for group in groups:
        masks = [answer.trained & real for answer in group.answers]
        runs = [_runs(mask) for mask in masks]
        begins = len(group.prompt) + np.concatenate([[0], np.cumsum([len(mask) for mask in masks])])
        spans = np.concatenate([begin + run for begin, run in zip(begins, runs)])
        rows.append(
            {
                "ids": np.concatenate([group.prompt, *(answer.ids for answer in group.answers)]),
                "prefix": len(group.prompt),
                "suffixes": [len(answer.ids) for answer in group.answers],
                "ranks": np.full(len(group.answers), np.nan, np.float32),
                "scores": np.full(len(group.answers), np.nan, np.float32),
                "spans": spans,
                "span_weights": np.ones(len(spans) // 2, np.float32),
                "weight": float(real),
                "source": group.source,
                "row": group.row,
            }
        )
    batch = collate_groups(
        rows, layout=how.layout, pad_id=how.pad_id, window_weight=window_weight, share_prompt=how.share_prompt
    )
    answers = [answer for group in groups for answer in group.answers]
    names = set.intersection(*(set(answer.tokens) for answer in answers)) if real else {"behaviour", "advantages"}

    def tokens_of(name: str) -> Tensor:
        if not real:
            return torch.zeros(0)
        return torch.from_numpy(np.concatenate([answer.tokens[name][answer.trained] for answer in answers]))

    return RolloutBatch(
        answers=batch,
        rewards=torch.tensor([answer.reward for answer in answers], dtype=torch.float32),
        truncated=torch.tensor([not answer.finished for answer in answers]),
        group_tokens=torch.tensor([group.trained if real else 0 for group in groups for _ in group.answers]),
        tokens={name: tokens_of(name) for name in sorted(names)},
        window=window,
        micro=micro,
    )


def _runs(mask: np.ndarray) -> np.ndarray:
    """Start and end of each run of True, int64 [2 S]."""
    return np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
