"""All rewards of a run: each is asked, timed and counted, and their weighted sum is what the policy learns from."""

from __future__ import annotations

import logging
import math
import numbers
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from ptl.rewards.base import Completion, Failure, Outcome, Reward

RECENT = 100
"""Answers over which the rate of errors is taken."""
_LOG = logging.getLogger(__name__)


class RewardError(RuntimeError):
    """Too many answers could not be judged; the run must stop."""


class Judged(NamedTuple):
    """What the rewards say of a batch.

    Attributes:
        totals: for each answer the sum of weight times value over the rewards that apply; NaN where none applies, or
            where one failed, since a sum that lacks a part cannot be compared with the others.
        outcomes: by reward, one for each answer.
        metrics: name -> (sum, weight), to be added up over ranks: ``reward``, and by reward ``<name>``,
            ``<name>_square``, and as shares of the answers ``<name>_absent`` and ``<name>_error``; ``<name>_ms`` is the
            time an answer took. Beside them what a reward measures itself, as ``<name>_<measure>``.
        errors: (reward, reason) -> answers.
    """

    totals: list[float]
    outcomes: dict[str, list[Outcome]]
    metrics: dict[str, tuple[float, float]]
    errors: dict[tuple[str, str], int]


class RewardPanel:
    """The rewards of a run.

    An answer that a reward cannot judge has the total NaN: it takes no part in its group, neither as a 0 nor as a
    mean. A reward fails for an answer when it returns a ``Failure``; when it raises (``raised``), takes longer than its
    ``seconds`` (``timeout``), returns a number of outcomes other than that of the answers (``wrong_length``), and then
    for the whole batch; and when it returns NaN, an infinity (``not_finite``) or no number (``wrong_type``).

    Arguments:
        rewards: at least one, of different names, not all of weight 0.
        error_limit: most failures among the last 100 answers, as a share of 100, in [0, 1]: 0.1 stops at the eleventh.
            1 never stops.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, rewards: Sequence[Reward], *, error_limit: float = 0.1) -> None:
        if not rewards:
            raise ValueError("there is no reward: list one or more under model.rewards")
        twice = [name for name, n in Counter(reward.name for reward in rewards).items() if n > 1]
        if twice:
            raise ValueError(f"two rewards have the name {twice[0]!r}: give one of them another name")
        if not any(reward.weight for reward in rewards):
            raise ValueError("every reward has the weight 0, so there is nothing to learn from: give one a weight")
        if not 0 <= error_limit <= 1:
            raise ValueError(f"error_limit must be in [0, 1], got {error_limit}")
        self.rewards, self.error_limit = tuple(rewards), error_limit
        self._recent: dict[str, deque[Failure | None]] = {reward.name: deque(maxlen=RECENT) for reward in rewards}
        self._stuck: dict[str, threading.Thread] = {}
        self._told: set[tuple[str, str]] = set()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names that ``Judged.metrics`` may hold."""
        of = {reward.name: (*_SUFFIXES, *(f"_{name}" for name in reward.measured)) for reward in self.rewards}
        return ("reward", *(f"{name}{suffix}" for name, suffixes in of.items() for suffix in suffixes))

    def score(self, completions: Sequence[Completion]) -> Judged:
        """Asks every reward about a batch of answers, whole groups or not.

        Raises:
            RewardError: a reward failed more often than the limit allows.
        """
        outcomes: dict[str, list[Outcome]] = {}
        metrics: dict[str, tuple[float, float]] = {}
        errors: Counter[tuple[str, str]] = Counter()
        for reward in self.rewards:
            began = time.perf_counter()
            found = self._ask(reward, completions)
            metrics |= _measures(reward.name, found, 1e3 * (time.perf_counter() - began))
            metrics |= {f"{reward.name}_{name}": pair for name, pair in reward.take_measures().items()}
            outcomes[reward.name] = found
            failures = [outcome if isinstance(outcome, Failure) else None for outcome in found]
            errors.update((reward.name, failure.reason) for failure in failures if failure)
            self._tell(reward, completions, failures)
            self._recent[reward.name].extend(failures)
            self._stop_where_too_many(reward)
        totals = [self._total(values) for values in zip(*outcomes.values())]
        known = [total for total in totals if not math.isnan(total)]
        metrics["reward"] = (math.fsum(known), float(len(known)))
        return Judged(totals, outcomes, metrics, dict(errors))

    def close(self) -> None:
        """Ends what the rewards have started."""
        for reward in self.rewards:
            reward.close()

    def _ask(self, reward: Reward, completions: Sequence[Completion]) -> list[Outcome]:
        if not completions:
            return []
        try:
            found = self._call(reward, completions)
        except (Exception, SystemExit) as error:
            return [Failure("raised", f"{type(error).__name__}: {error}")] * len(completions)
        if isinstance(found, Failure):
            return [found] * len(completions)
        try:
            found = None if isinstance(found, str) else list(found)
        except TypeError:
            found = None
        if found is None:
            what = "it returned no list with one outcome an answer"
            return [Failure("wrong_type", what)] * len(completions)
        if len(found) != len(completions):
            what = f"it returned {len(found)} outcomes for {len(completions)} answers"
            return [Failure("wrong_length", what)] * len(completions)
        return [checked(outcome) for outcome in found]

    def _call(self, reward: Reward, completions: Sequence[Completion]) -> Any:
        if reward.seconds is None:
            return reward.score(completions)
        stuck = self._stuck.get(reward.name)
        if stuck is not None and stuck.is_alive():
            return Failure("timeout", "it still works on an earlier batch")
        box: list[Any] = []

        def work() -> None:
            try:
                box.append((reward.score(completions), None))
            except (Exception, SystemExit) as error:
                box.append((None, error))

        # A thread cannot be ended, but it can be left alone; the run goes on or stops by its limit of errors.
        thread = threading.Thread(target=work, name=f"reward {reward.name}", daemon=True)
        thread.start()
        thread.join(reward.seconds)
        if not box:
            self._stuck[reward.name] = thread
            return Failure("timeout", f"it took longer than {reward.seconds:g} s for {len(completions)} answers")
        found, error = box[0]
        if error is not None:
            raise error
        return found

    def _total(self, outcomes: tuple[Outcome, ...]) -> float:
        if any(isinstance(outcome, Failure) for outcome in outcomes):
            return math.nan
        parts = [r.weight * value for r, value in zip(self.rewards, outcomes) if isinstance(value, float)]
        return math.fsum(parts) if parts else math.nan

    def _tell(self, reward: Reward, completions: Sequence[Completion], failures: Sequence[Failure | None]) -> None:
        """Warns once of each reward and reason, with where the first such prompt is."""
        for completion, failure in zip(completions, failures):
            if failure is not None and (reward.name, failure.reason) not in self._told:
                self._told.add((reward.name, failure.reason))
                detail = f": {failure.detail}" if failure.detail else ""
                _LOG.warning(
                    "The reward %s failed with %s at %s%s. Such answers take no part in training; more are counted "
                    "in <reward>_error.",
                    reward.name,
                    failure.reason,
                    completion.prompt.origin,
                    detail,
                )

    def _stop_where_too_many(self, reward: Reward) -> None:
        recent = self._recent[reward.name]
        failed = [failure for failure in recent if failure is not None]
        if self.error_limit < 1 and len(failed) > self.error_limit * RECENT:
            reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(f.reason for f in failed).most_common())
            raise RewardError(
                f"the reward {reward.name} failed for {len(failed)} of the last {len(recent)} answers ({reasons}), "
                f"where error_limit {self.error_limit:g} allows {self.error_limit * RECENT:g} in {RECENT}; the last: "
                f"{failed[-1].detail or failed[-1].reason}. Mend the reward or its data, or raise error_limit"
            )


_SUFFIXES = ("", "_square", "_absent", "_error", "_ms")
"""Of a reward's name, for what ``_measures`` gives."""


def checked(outcome: Any) -> Outcome:
    """An outcome as a float, None or a ``Failure``, whatever number it came as: True is 1, and NaN is no number."""
    if outcome is None or isinstance(outcome, Failure):
        return outcome
    if not isinstance(outcome, numbers.Real) and getattr(outcome, "shape", None) == () and hasattr(outcome, "item"):
        outcome = outcome.item()  # a 0-d tensor or array
    if not isinstance(outcome, numbers.Real):
        return Failure("wrong_type", f"it returned {type(outcome).__name__}, and a number or None was expected")
    try:
        value = float(outcome)
    except OverflowError:
        value = math.inf
    return value if math.isfinite(value) else Failure("not_finite", f"it returned {value}")


def _measures(name: str, outcomes: Sequence[Outcome], milliseconds: float) -> dict[str, tuple[float, float]]:
    values = [outcome for outcome in outcomes if isinstance(outcome, float)]
    number, known = float(len(outcomes)), float(len(values))
    return {
        name: (math.fsum(values), known),
        f"{name}_square": (math.fsum(value * value for value in values), known),
        f"{name}_absent": (float(sum(outcome is None for outcome in outcomes)), number),
        f"{name}_error": (float(sum(isinstance(outcome, Failure) for outcome in outcomes)), number),
        f"{name}_ms": (milliseconds, number),
    }
