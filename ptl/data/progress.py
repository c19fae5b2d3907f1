"""Where training stands in the data, told from the trainer's public progress, and how a resumed pass begins there.

Lightning counts a rank's micro-batches in an epoch; the data counts units over all ranks. Both agree as long as ranks,
accumulation and micro-batch size stay what they were. After a resume that changes them the count of micro-batches is
set to what the new sizes make of the units that are left, so that optimizer steps and the end of the epoch fall where
the data has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L

from ptl.data.order import Plan


@dataclass(frozen=True)
class Position:
    """A point in the data between two optimizer steps.

    Attributes:
        epoch: from 0.
        units: consumed in this epoch over all ranks; all of them when the epoch is done.
        inner: optimizer steps since then, of a rollout whose answers are still trained on.
        window: units of a step over all ranks, where ``inner`` counts such steps.
    """

    epoch: int = 0
    units: int = 0
    inner: int = 0
    window: int = 0


PlanAt = Callable[[Position], Plan]
"""The plan of an epoch from a position on, with the sizes that hold at the call."""


class Cursor:
    """Follows one fit through the data. A *pass* iterates the training loader once: an epoch, or the rest of one."""

    def __init__(self) -> None:
        self._start: Position | None = None
        self._first_batch: int | None = None  # of the pass, as Lightning counts; None before it begins

    def reset(self) -> None:
        """Forgets the former fit."""
        self._start = self._first_batch = None

    def load(self, position: Position) -> None:
        """The next pass begins here."""
        self._start, self._first_batch = position, None

    def position(self, trainer: L.Trainer | None, plan_at: PlanAt) -> Position:
        """The position after the last whole optimizer step.

        Micro-batches of a window that has not stepped do not count: a checkpoint does not hold their gradients.
        """
        if self._start is None:
            return Position(trainer.current_epoch if trainer else 0)
        if self._first_batch is None or trainer is None:
            return self._start
        plan, done = plan_at(self._start), _finished(trainer)
        if done >= trainer.num_training_batches:
            return Position(self._start.epoch, plan.units)
        return _after(plan, max(0, done - self._first_batch) // plan.accumulate)

    def expect(self, trainer: L.Trainer, plan_at: PlanAt, batches: int) -> None:
        """Sets Lightning's counts to a loaded position, before its loops look at them.

        Lightning counts an epoch that was stopped halfway as done once ``fit`` has returned; the data goes on inside
        it, so a run of so many epochs is not over yet.

        Args:
            trainer: that is about to fit.
            plan_at: see ``PlanAt``.
            batches: micro-batches that the trainer runs in a whole epoch.
        """
        if self._start is not None and self._first_batch is None:
            plan = plan_at(self._start)
            _set_finished(trainer, min(_batches_before(plan), batches))
            epochs = trainer.fit_loop.epoch_progress
            ahead = getattr(epochs.current, "processed") - plan.epoch  # noqa: B009 (typed as a base class)
            unfinished = trainer.max_steps == -1 or trainer.global_step < trainer.max_steps
            if plan.steps and ahead > 0 and unfinished:
                _shift(epochs.current, -ahead)
                _shift(epochs.total, -ahead)

    def jump(self, trainer: L.Trainer, position: Position, plan_at: PlanAt, batches: int) -> None:
        """The next pass begins at a later position than the checkpoint's; before the first batch.

        Args:
            trainer: about to run its first batch.
            position: where the data goes on.
            plan_at: see ``PlanAt``.
            batches: micro-batches that the trainer runs in a whole epoch.
        """
        if plan_at(position).steps == 0:
            position = Position(position.epoch + 1)
        self.load(position)
        epochs = trainer.fit_loop.epoch_progress
        ahead = position.epoch - getattr(epochs.current, "processed")  # noqa: B009 (typed as a base class)
        _shift(epochs.current, ahead)
        _shift(epochs.total, ahead)
        _set_finished(trainer, min(_batches_before(plan_at(position)), batches))

    def begin(self, trainer: L.Trainer | None, plan_at: PlanAt) -> Plan:
        """Starts the next pass and returns its plan.

        Raises:
            RuntimeError: Lightning's count lies behind the loaded position, so it would end the epoch too early.
        """
        plan = plan_at(self._next_start(trainer, plan_at))
        if plan.steps == 0:
            plan = plan_at(Position(plan.epoch + 1))
        self._start, self._first_batch = _after(plan, 0), _batches_before(plan)
        if trainer is not None:
            if _finished(trainer) > self._first_batch:
                raise RuntimeError(
                    f"the trainer counts {_finished(trainer)} micro-batches of epoch {plan.epoch} as done, the data "
                    f"{self._first_batch}: the training loader was made before the checkpoint was loaded. Read "
                    "`steps_per_epoch` of the data module in place of `trainer.estimated_stepping_batches`"
                )
            _set_finished(trainer, self._first_batch)
        return plan

    def _next_start(self, trainer: L.Trainer | None, plan_at: PlanAt) -> Position:
        if self._start is None:
            if trainer is None:
                return Position()
            plan = plan_at(Position(trainer.current_epoch))
            return _after(plan, _finished(trainer) // plan.accumulate)
        return self._start if self._first_batch is None else Position(self._start.epoch + 1)


def position_of(state: Mapping[str, Any], identity: Mapping[str, Any]) -> Position:
    """The position a checkpoint holds, if it has a meaning in the data at hand.

    At the end or the start of an epoch it has, whatever changed: the next epoch begins.

    Args:
        state: ``epoch``, ``units`` and the identity of the data they were counted in.
        identity: of the data at hand: ``of``, units an epoch, and what the order depends on.

    Raises:
        ValueError: it lies inside an epoch of other data, or of another order.
    """
    changed = [f"{name} {state.get(name)} -> {value}" for name, value in identity.items() if state.get(name) != value]
    inner, window = state.get("inner", 0), state.get("window", 0)
    if changed and (0 < state["units"] < state["of"] or inner):
        raise ValueError(
            f"the checkpoint is {state['units']} of {state['of']} units into epoch {state['epoch']}, and the data is "
            f"not the same ({', '.join(changed)}; of: units an epoch): resume with the data.train, data.pack_to, "
            "data.val_fraction, data.seed, data.shuffle and data.easy_first (with the same rates) of the run, or from "
            "a checkpoint at the end of an epoch"
        )
    return Position(state["epoch"], identity["of"] if state["units"] == state["of"] else state["units"], inner, window)


def _after(plan: Plan, steps: int) -> Position:
    units, inner = plan.after(steps)
    return Position(plan.epoch, units, inner, plan.window_size if inner else 0)


def epoch_batches(plan: Plan) -> int:
    """Micro-batches of a rank in a whole epoch."""
    return plan.steps_per_epoch * plan.accumulate


def limited_batches(trainer: L.Trainer | None, batches: int) -> int:
    """How many of an epoch's micro-batches the trainer runs, with its ``limit_train_batches``."""
    limit = 1.0 if trainer is None else trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))


def _batches_before(plan: Plan) -> int:
    """Micro-batches of a rank that count as done at the start of a plan, so that those left complete the epoch."""
    return (plan.steps_per_epoch - plan.steps) * plan.accumulate


def _finished(trainer: L.Trainer) -> int:
    """Micro-batches of the epoch that this rank has trained on."""
    return getattr(trainer.fit_loop.epoch_loop.batch_progress.current, "processed")  # noqa: B009 (typed as a base class)


def _set_finished(trainer: L.Trainer, batches: int) -> None:
    _shift(trainer.fit_loop.epoch_loop.batch_progress.current, batches - _finished(trainer))


def _shift(counts: Any, by: int) -> None:
    """Moves Lightning's four counts of one thing, keeping their differences: it may be between two of them."""
    for name in ("ready", "started", "processed", "completed"):
        setattr(counts, name, getattr(counts, name) + by)
