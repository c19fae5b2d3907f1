"""Sampled answers for a reader's eye."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptl.rewards.answers import final_answer
from ptl.rewards.base import Failure, Outcome
from ptl.rollout.buffer import Answer, Group


def said_at_last(answer: Answer) -> str | None:
    """The final answer, such that equal ones are equal."""
    found = final_answer(answer.said) if answer.said is not None else None
    return " ".join(found.text.lower().split()) if found is not None else None


def table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Answers for a reader's eye, a row each: what was asked and said, every reward, the advantage, and the status.

    ``status`` is ``ok``; ``truncated``; or ``error`` where a reward failed, which says why.
    """
    rows = []
    for group in groups:
        for answer in group.answers:
            if answer.said is None:
                continue
            failed = any(isinstance(outcome, Failure) for outcome in answer.outcomes.values())
            advantage = answer.tokens.get("advantages")
            rows.append(
                {
                    "origin": str(answer.said.prompt.origin),
                    "prompt": answer.said.prompt.messages[-1].content,
                    "completion": answer.said.text,
                    "expected": answer.said.prompt.answer,
                    "rewards": {name: _shown(outcome) for name, outcome in answer.outcomes.items()},
                    "reward": answer.reward if np.isfinite(answer.reward) else None,
                    "advantage": None if advantage is None else float(np.nanmean(advantage)),
                    "status": "error" if failed else "ok" if answer.finished else "truncated",
                    "tokens": len(answer.ids),
                    "version": answer.version,
                }
            )
    return rows


def _shown(outcome: Outcome) -> float | str | None:
    return f"{outcome.reason}: {outcome.detail}" if isinstance(outcome, Failure) else outcome
