"""A decision process small enough to walk through whole: three words, answers of at most three of them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ptl.rewards.base import Completion, Outcome, Reward
from ptl.rollout.engine import Abilities, Asked, Draws, Engine
from ptl.rollout.sampling import Sampled
from tests import tiny
from tests.objectives import rl

END, LONGEST = 0, 3
PROMPT = [2, 1]


def answers() -> list[list[int]]:
    """All of them: the end comes once and last, or the limit does."""
    free = [1, 2]
    ended = [[*a, END] for n in range(LONGEST) for a in itertools.product(free, repeat=n)]
    return [*ended, *([*a] for a in itertools.product(free, repeat=LONGEST))]


def reward_of(ids: Sequence[int]) -> float:
    return math.sin(3.0 * sum((k + 1) * (i + 1) ** 2 for k, i in enumerate(ids)))


class Table(Reward):
    """A number for each answer."""

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        return [reward_of(completion.ids) for completion in completions]


class Every(Engine):
    """Draws each answer once, and says that all were equally likely: the importance weight of an answer is then its
    probability times their number, so that a loss over all of them is an expectation."""

    abilities = Abilities(logprobs=True, zero3=False, quantized=False, reproducible=True)

    @contextmanager
    def session(self, policy: Any, strategy: Any, version: int) -> Iterator[Any]:
        def draw(asked: Sequence[Asked], draws: Draws) -> list[list[Sampled]]:
            every = answers()
            assert draws.samples == len(every) and all(one.limit == LONGEST for one in asked)
            return [[Sampled(ids, [-math.log(len(every)) / len(ids)] * len(ids)) for ids in every] for _ in asked]

        yield draw


def make_folder(folder: Path) -> Path:
    tiny.save_folder(folder / "model", rl.word_tokenizer([]), tie=False, initializer_range=0.3)
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "..."}) + "\n")
    return folder


def logprobs(model: Any, ids: Sequence[int]) -> Any:
    """Of an answer's tokens, [T], with their graph."""
    logits = model(input_ids=torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def expected_reward(model: Any) -> Any:
    """Over all answers, with its graph."""
    return sum(logprobs(model, ids).sum().exp() * reward_of(ids) for ids in answers())


def true_values(model: Any) -> dict[tuple[int, ...], float]:
    """What is to be expected from each state on, by what has been written."""
    states: dict[tuple[int, ...], list[float]] = {}
    with torch.no_grad():
        for ids in answers():
            logp = logprobs(model, ids)
            for t in range(len(ids)):
                share = float(logp[t:].sum().exp())
                found = states.setdefault(tuple(ids[:t]), [0.0])
                found[0] += share * reward_of(ids)
    return {state: value for state, (value,) in states.items()}


def states_of(model: Any, states: Sequence[tuple[int, ...]]) -> Any:
    """The hidden state that stands for each, [S, H]."""
    with torch.no_grad():
        return torch.stack([model.model(torch.tensor([[*PROMPT, *s]])).last_hidden_state[0, -1] for s in states])
