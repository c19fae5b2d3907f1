"""A few processes that run a function on one job each, and are killed when they take too long.

A thread cannot be ended, and an alarm is not heard while a regular expression or a power of large integers holds the
interpreter; a process can be killed whatever it does. They are started as programs, never forked: the caller may have
CUDA, threads and process groups.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

from ptl.rewards.base import Failure

START_SECONDS = 120.0
"""Most time that a process may take to import its function: on a cluster all read the same file system."""
_MOST_BYTES = 8 << 20


class Workers:
    """Processes that keep running between batches; those that die are replaced, and those that hang are killed.

    Arguments:
        function: dotted path of a function of one argument that can be pickled, to a number or None.
        count: processes, 1 or more.
        seconds: wall-clock time that a job may take, above 0.
        memory: bytes of address space of each; 0 leaves it.
        gives: what the function returns: a number or None, or a text.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        function: str,
        *,
        count: int,
        seconds: float,
        memory: int = 0,
        gives: Literal["number", "text"] = "number",
    ) -> None:
        if count < 1:
            raise ValueError(f"the number of processes must be 1 or more, got {count}")
        if not seconds > 0:
            raise ValueError(f"the time limit of a call must be above 0 seconds, got {seconds}")
        self.function, self.count, self.seconds, self.memory, self.gives = function, count, seconds, memory, gives
        self._workers: list[_Worker] = []
        self._last_words = weakref.finalize(self, _kill_all, self._workers)

    def run(self, jobs: Sequence[Any]) -> list[Any]:
        """What the function makes of each job, in order: numbers or None, or texts.

        A ``Failure`` where it raised (``raised``), took too long (``timeout``), ended its process (``died``) or
        returned something else (``wrong_type``).

        Raises:
            RuntimeError: the processes cannot be started, with the reason.
        """
        outcomes: list[Any] = [None] * len(jobs)
        waiting = deque(enumerate(jobs))
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
                    if worker.job is None and worker.ready:
                        self._drop(worker)  # it died between batches
                busy = sum(worker.job is not None for worker in self._workers)
                while len(self._workers) < min(self.count, busy + len(waiting)):
                    self._workers.append(_Worker(self.function, self.seconds, self.memory, self.gives))
                for worker in self._workers:
                    if waiting and worker.ready and worker.job is None:
                        index, job = waiting.popleft()
                        if failure := worker.give(index, job, self.seconds):
                            outcomes[index] = failure
                self._listen(outcomes)
        except BaseException:
            self.close()  # what is under way must not answer the next batch
            raise
        return outcomes

    def close(self) -> None:
        """Kills the processes; the next ``run`` starts others."""
        _kill_all(self._workers)

    def _listen(self, outcomes: list[Any]) -> None:
        """Waits for the first thing to happen and settles it."""
        active = [worker for worker in self._workers if worker.job is not None or not worker.ready]
        if not active:
            return
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.out, selectors.EVENT_READ, worker)
            patience = min(worker.deadline for worker in active) - time.monotonic()
            told = [key.data for key, _ in selector.select(max(patience, 0.0))]
        for worker in told:
            line = worker.read()
            if line is None:
                continue
            if worker.ready and worker.job is not None:
                outcomes[worker.job] = _understood(line)
                worker.job = None
                if not line:
                    self._drop(worker)
            elif b'"ready"' in line:
                worker.ready = True
            else:
                self._cannot_start(line)
        for worker in active:
            if worker in self._workers and worker not in told and time.monotonic() > worker.deadline:
                if not worker.ready:
                    self._cannot_start(b"")
                if worker.job is not None:
                    outcomes[worker.job] = Failure("timeout", f"it took longer than {self.seconds:g} s")
                    self._drop(worker)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()

    def _cannot_start(self, line: bytes) -> None:
        why = json.loads(line).get("missing", "") if line.strip() else "the process ended or did not answer"
        raise RuntimeError(f"the function {self.function} cannot be started: {why}")


class _Worker:
    """One process, and the job it has."""

    def __init__(self, function: str, seconds: float, memory: int, gives: str) -> None:
        facts = [function, str(seconds), str(memory), str(os.getpid()), gives]
        command = [sys.executable, "-m", "ptl.rewards.worker", *facts]
        # What the caller can import, it can; it is no place for a GPU or for many threads.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        env["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout
        self.into, self.out = self.process.stdin, self.process.stdout
        self.ready, self.job = False, None
        self.deadline = time.monotonic() + START_SECONDS
        self._buffer = b""

    ready: bool
    job: int | None

    def give(self, index: int, job: Any, seconds: float) -> Failure | None:
        """Sends a job, or says why it cannot be sent."""
        try:
            payload = pickle.dumps(job)
        except Exception as error:
            return Failure("raised", f"the answer cannot be sent to a process: {type(error).__name__}: {error}")
        self.job, self.deadline = index, time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # then it is dead, which is seen when it is read
            self.into.write(len(payload).to_bytes(8, "big") + payload)
            self.into.flush()
        return None

    def read(self) -> bytes | None:
        """A whole line; empty when the process has ended or writes without end; None when the line is not whole yet."""
        data = os.read(self.out.fileno(), 65536)
        self._buffer += data
        line, whole, rest = self._buffer.partition(b"\n")
        if whole:
            self._buffer = rest
            return line
        return b"" if not data or len(self._buffer) > _MOST_BYTES else None

    def kill(self) -> None:
        """Ends it and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.into, self.out):
            with contextlib.suppress(OSError):
                pipe.close()


def _understood(line: bytes) -> Any:
    if not line:
        return Failure("died", "its process ended, perhaps for want of memory")
    said = json.loads(line)
    return Failure(said["error"], said.get("detail", "")) if "error" in said else said["value"]


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
