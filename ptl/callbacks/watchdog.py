"""Ends a run that hangs, with the stacks of every rank, so that it can be started again."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import statistics
import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from ptl.callbacks.exit_codes import HUNG
from ptl.callbacks.jsonl import read_rows
from ptl.callbacks.record import ATTEMPTS_FILE, run_folder
from ptl.data.durable import append_line
from ptl.strategies.flight import write_flight_record

FOLDER = "stacks"
_KEPT_STEPS = 64
_MOST_POLL = 5.0
_MOST_GRACE = 60.0
_SETTLE = 0.2


@dataclass(frozen=True)
class Limits:
    """How long a rank may get on with nothing.

    Attributes:
        step: least limit, in seconds, while training batches are worked off.
        slow: the same in phases that give no sign of life.
        times_median: a step may take this many times the median step, where that is longer.
    """

    step: float
    slow: float
    times_median: float


class Progress:
    """When this process last finished something. A mark costs a reading of the clock.

    Arguments:
        limits: how long it may be silent.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.what = "the start of the fit"
        self.slow = True
        self.moment = self._step_moment = time.monotonic()
        self._seconds = array("d", [0.0] * _KEPT_STEPS)
        self._steps = 0

    def mark(self, what: str, *, slow: bool = False) -> None:
        """Something is finished.

        Arguments:
            what: it was; for the report.
            slow: what follows gives no sign of life for long.
        """
        self.what = what
        # Before the first step all is slow: compilation, the first rollout, caches.
        self.slow = slow or not self._steps
        self.moment = time.monotonic()

    def step(self) -> None:
        """An optimizer step is finished."""
        now = time.monotonic()
        self._seconds[self._steps % _KEPT_STEPS] = now - self._step_moment
        self._steps += 1
        self._step_moment = now

    @property
    def silent(self) -> float:
        """Seconds since the last mark."""
        return time.monotonic() - self.moment

    @property
    def limit(self) -> float:
        """Seconds that the present silence may last."""
        # The first step is left out: it holds compilation and the filling of caches.
        known = self._seconds[1 if self._steps <= _KEPT_STEPS else 0 : min(self._steps, _KEPT_STEPS)]
        median = statistics.median(known) if known else 0.0
        least = self.limits.slow if self.slow else self.limits.step
        return max(least, self.limits.times_median * median)


class Watchdog(L.Callback):
    """Writes every rank's stacks and ends the process when nothing gets finished for too long.

    Each rank has a thread that looks at when its training last finished a batch, a step, a validation batch or a save.
    After ``max(times_median * median step, minutes)`` it writes the stacks of all threads to
    ``RUN/stacks/attempt-<n>/rank<k>.txt`` and its last collectives to ``collectives<k>.txt`` beside it, says so on
    stderr, and ends with exit code 86. When one rank hangs the others wait for it and soon fall silent too: whoever
    sees another's stacks writes its own, and the first waits for them up to a minute. Phases without a sign of life,
    such as sampling, saving, an export or anything before the first step, have ``slow_minutes``.

    A thread of Python's cannot run while another holds the interpreter's lock; a rank that hangs so is ended by what
    the others' exit sets off.

    Arguments:
        minutes: least silence that counts as a hang while batches are worked off; 0 watches nothing.
        slow_minutes: the same in phases that give no sign of life.
        times_median: a step may take this many times the median of the last steps.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, *, minutes: float = 15.0, slow_minutes: float = 120.0, times_median: float = 10.0) -> None:
        if minutes < 0:
            raise ValueError(f"watchdog.minutes must be 0 or more, got {minutes}")
        if slow_minutes < minutes:
            raise ValueError(f"watchdog.slow_minutes must be at least watchdog.minutes {minutes}, got {slow_minutes}")
        if times_median < 1:
            raise ValueError(f"watchdog.times_median must be 1 or more, got {times_median}")
        self.limits = Limits(step=60 * minutes, slow=60 * slow_minutes, times_median=times_median)
        self._progress = Progress(self.limits)
        self._watch: _Watch | None = None
        self._pauses = 0
        self._global_step = 0
        self._samples = False

    # ---- life of the thread ----

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress = Progress(self.limits)
        self._pauses = 0
        self._samples = bool(getattr(getattr(pl_module, "view", None), "samples", False))
        if not self.limits.step:
            return
        run = run_folder(trainer)
        attempt = trainer.strategy.broadcast(attempt_of(run) if trainer.is_global_zero else 0)
        place = Place(run, int(attempt), trainer.global_rank, trainer.world_size)
        self._watch = _Watch(self._progress, place)
        self._watch.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._watch is not None and self._watch.ending:
            # Another rank has already left, and what waited for it here fails: that is not how this run ended.
            self._watch.join()
        self._stop()

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.done.set()
            self._watch = None

    # ---- signs of life ----

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._global_step = trainer.global_step
        self._progress.mark("the start of training", slow=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._progress.mark("the loading of a batch")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._progress.step()
        # What samples does so between two batches.
        self._progress.mark("a training batch", slow=self._samples)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.mark("training, before a validation", slow=True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._progress.mark("a validation batch", slow=self._samples)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.mark("a validation", slow=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._progress.mark("training, before a checkpoint", slow=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.mark("training", slow=True)

    def pause(self) -> None:
        """What follows, up to ``resume``, gives no sign of life; pauses nest."""
        self._pauses += 1
        self._progress.mark("training, before a pause", slow=True)

    def resume(self) -> None:
        """Training goes on."""
        self._pauses -= 1
        self._progress.mark("a pause", slow=self._pauses > 0)


@dataclass(frozen=True)
class Place:
    """Where a rank leaves what it has to say.

    Attributes:
        run: the run folder.
        attempt: number of the attempt, from 1.
        rank: of ``world_size``.
        world_size: ranks.
    """

    run: Path
    attempt: int
    rank: int
    world_size: int

    @property
    def folder(self) -> Path:
        """The folder of this attempt's stacks."""
        return self.run / FOLDER / f"attempt-{self.attempt}"

    def reported(self) -> int:
        """How many ranks have left their stacks."""
        return len(list(self.folder.glob("rank*.txt")))


def attempt_of(run: Path) -> int:
    """Number of the attempt that is under way, from 1: what the run's record says, else what no former one has."""
    attempts = run / ATTEMPTS_FILE
    if attempts.exists():
        return max(1, sum(row.get("event") == "start" for row in read_rows(attempts)))
    former = [int(path.name.split("-")[1]) for path in (run / FOLDER).glob("attempt-*")]
    return 1 + max(former, default=0)


class _Watch(threading.Thread):
    """Looks at the progress until it is done, or ends the process."""

    def __init__(self, progress: Progress, place: Place) -> None:
        super().__init__(name="ptl-watchdog", daemon=True)
        self.done = threading.Event()
        self.ending = False
        self._progress, self._place = progress, place
        self._poll = min(_MOST_POLL, progress.limits.step / 20)

    def run(self) -> None:
        while not self.done.wait(self._poll):
            silent, limit = self._progress.silent, self._progress.limit
            # The folder is looked at only by who is silent itself: it may lie on a file system that all ranks share.
            if silent > limit or (silent > limit / 2 and self._place.reported()):
                self._end(silent, limit)

    def _end(self, silent: float, limit: float) -> None:
        self.ending = True
        # In a thread of its own: the file system may be what hangs.
        report = threading.Thread(target=self._report, args=(silent, limit), daemon=True)
        report.start()
        report.join(min(_MOST_GRACE, limit))
        os._exit(HUNG)

    def _report(self, silent: float, limit: float) -> None:
        place, what = self._place, self._progress.what
        path = place.folder / f"rank{place.rank}.txt"
        text = (
            f"rank {place.rank} of {place.world_size} on {socket.gethostname()}, process {os.getpid()}: nothing "
            f"finished for {silent:.0f} s (limit {limit:.0f} s) since {what}"
        )
        place.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(f"{text}\n\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        partial.rename(path)
        # One write, without the locks of sys.stderr, which the thread that hangs may hold.
        os.write(2, f"ptl: hang: {text}; stacks in {path}; exit code {HUNG}\n".encode())
        if place.rank == 0 and (place.run / ATTEMPTS_FILE).exists():
            end = {"event": "end", "attempt": place.attempt, "time": time.time(), "status": "hung"}
            append_line(place.run / ATTEMPTS_FILE, json.dumps(end))
        write_flight_record(place.folder, place.rank)
        # Whoever started the ranks ends the others once one is gone.
        while place.reported() < place.world_size:
            time.sleep(self._poll)
        time.sleep(_SETTLE)
