"""What the data set of reasoning-gym that asked a question says of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

from ptl.rewards.answers import final_answer
from ptl.rewards.base import Completion, Failure, Outcome, Reward
from ptl.rewards.workers import Workers

VERSION = "0.1.25"
"""Of reasoning-gym; its scorers were read for those that run an answer as Python, see ``gym_check``."""
MEMORY = 4 << 30
"""Bytes of address space of a process that judges: an expression can ask for all there is."""


class GymScore(Reward):
    """The score in [0, 1] that a ``gym://`` row's own data set gives the final answer; None for other prompts.

    Where an answer is, ``final_answer`` tells; no answer is 0. Some data sets give a part for an answer that is nearly
    right, or in another form than was asked for, and a few a hundredth for any answer; those that give 1 to wrong
    answers (``gym_check.FOOLED``) are refused, as failures. They judge in processes that are killed after
    ``seconds_each``: a failure with a reason (``timeout``, ``died``, ``raised``), not a wrong answer. What is more than
    numbers, lists or a formula never reaches a data set that would run it as Python: it is a wrong answer.

    Arguments:
        seconds_each: time that an answer may take, with making the question again, above 0.
        processes: that share the work, 1 or more.
        weight, name: as in ``Reward``.

    Raises:
        ValueError: reasoning-gym is not installed, or in another version; or an argument is out of its range.
    """

    seconds = None

    def __init__(
        self, *, seconds_each: float = 10.0, processes: int = 1, weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight=weight, name=name)
        if find_spec("reasoning_gym") is None:
            raise ValueError("GymScore needs reasoning-gym: pip install 'ptl[gym]'")
        if (version := metadata.version("reasoning-gym")) != VERSION:
            raise ValueError(
                f"GymScore knows which scorers of reasoning-gym {VERSION} run an answer as Python, but not those of "
                f"{version}, which is installed: pip install 'ptl[gym]'"
            )
        self._workers = Workers("ptl.rewards.gym_check.check", count=processes, seconds=seconds_each, memory=MEMORY)

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        work: dict[int, Answer] = {}
        for i, completion in enumerate(completions):
            given = _given(completion)
            if isinstance(given, Answer):
                work[i] = given
            outcomes.append(None if isinstance(given, Answer) else given)
        # The same answer to the same question is judged once: samples of a group agree often.
        distinct = list(dict.fromkeys(work.values()))
        verdicts = dict(zip(distinct, self._workers.run(distinct)))
        for i, answer in work.items():
            outcomes[i] = verdicts[answer]
        return outcomes

    def close(self) -> None:
        self._workers.close()


class Answer(NamedTuple):
    """What a data set has to judge.

    Attributes:
        text: the final answer.
        asked: the turn that asked.
        dataset, config, index: what makes the question again; ``config`` is JSON.
    """

    text: str
    asked: str
    dataset: str
    config: str
    index: int


def _given(completion: Completion) -> float | Failure | Answer | None:
    made_from = completion.prompt.meta.get("gym")
    if made_from is None:
        return None
    try:
        dataset, index = str(made_from["dataset"]), int(made_from["index"])
        config = json.dumps(dict(made_from["config"]), sort_keys=True)
    except (KeyError, TypeError, ValueError):
        keys = sorted(map(str, made_from)) if isinstance(made_from, Mapping) else type(made_from).__name__
        return Failure("bad_gym", f"gym is {keys}; expected dataset, config and index, as a gym:// source writes them")
    found = final_answer(completion)
    return 0.0 if found is None else Answer(found.text, completion.prompt.messages[-1].content, dataset, config, index)
