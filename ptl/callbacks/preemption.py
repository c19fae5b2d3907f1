"""Ends a run at a step boundary when the cluster takes the machine away, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import lightning as L

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.exit_codes import PreemptedError
from ptl.callbacks.wandb_run import tell
from ptl.strategies.agreement import StepAgreement, silence_sigterm_broadcast

JOB_END = "PTL_JOB_END"
"""Variable with the moment at which the job's time is up, in seconds since 1970; the batch scripts set it."""


class Preemption(L.Callback):
    """Saves and leaves when a signal comes or the job's time runs out.

    A handler only notes that the signal came. At the next optimizer step all ranks agree, so that a signal to one of
    them is enough and none waits in a collective for one that has left, and ``Checkpoint`` saves that step, behind a
    validation that is due. The loaders' processes ignore the signals, which SLURM sends to them too.

    Arguments:
        signals: names of the signals to leave on.
        margin_seconds: seconds before the end of the job at which to leave where no signal has come, besides the time
            that the slowest checkpoint and the slowest step have taken; the end is what ``PTL_JOB_END`` says.
            0 watches no clock.

    Raises:
        PreemptedError: from the training loop, on every rank.
        ValueError: a signal that the system has not, or a negative margin.
    """

    def __init__(self, *, signals: list[str] | None = None, margin_seconds: float = 120.0) -> None:
        names = ["SIGUSR1", "SIGTERM"] if signals is None else signals
        unknown = [name for name in names if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f"preemption.signals: got {unknown[0]!r}, expected names such as SIGUSR1 or SIGTERM")
        if margin_seconds < 0:
            raise ValueError(f"preemption.margin_seconds must be 0 or more, got {margin_seconds}")
        self.signals = [getattr(signal, name) for name in names]
        self.margin_seconds = margin_seconds
        self._process = os.getpid()
        self._received: str | None = None
        self._former: dict[int, Any] = {}
        self._agreement: StepAgreement | None = None
        self._leaving = False
        self._steps = 0
        self._moment = 0.0
        self._slowest_step = 0.0

    # ---- signals ----

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            silence_sigterm_broadcast(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._former = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A process that was forked from this one has the handler too, and must not take the signal for its own.
        if os.getpid() == self._process:
            self._received = signal.Signals(number).name

    # ---- steps ----

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: Lightning puts a handler of its own for SIGTERM just before.
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in self.signals}
        self._agreement = StepAgreement(trainer.world_size)
        self._steps = trainer.global_step
        self._moment = time.monotonic()
        self._leaving = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps or self._agreement is None or self._leaving:
            return
        now = time.monotonic()
        self._slowest_step = max(self._slowest_step, now - self._moment)
        self._steps, self._moment = trainer.global_step, now
        [self._leaving] = self._agreement.exchange([self._received is not None or self._time_is_up(trainer)])
        if self._leaving:
            self._agreement.close()
            _saver(trainer).request()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leaves here and not where it was saved, so that what the last step has logged is written."""
        if not self._leaving or not _saver(trainer).saved(trainer.global_step):
            return
        _saver(trainer).settle(trainer)
        for logger in trainer.loggers if trainer.is_global_zero else []:
            tell(logger, lambda run: run.mark_preempting())
        reason = self._received or (
            "the job's time is nearly up" if self._time_is_up(trainer) else "another rank's word"
        )
        raise PreemptedError(trainer.global_step, reason, _saver(trainer).newest)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._agreement is not None:
            self._agreement.close()

    def _time_is_up(self, trainer: L.Trainer) -> bool:
        end = os.environ.get(JOB_END)
        if not end or not self.margin_seconds:
            return False
        saving = max((c.slowest_save for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)), default=0.0)
        # Two steps: what is said now is known to all at the next step, and another may be needed to stop at.
        return time.time() > float(end) - self.margin_seconds - saving - 2 * self._slowest_step


def _saver(trainer: L.Trainer) -> Checkpoint:
    """The callback that keeps the newest checkpoint, else any that knows the folder."""
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoint)]
    if not ours:
        raise ValueError("preemption needs a ptl.callbacks.checkpoint.Checkpoint beside it, and the trainer has none")
    return next((callback for callback in ours if callback.monitor is None), ours[0])
