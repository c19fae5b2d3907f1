"""A pool of processes inside the sandbox, and the one that this process keeps for everybody."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ptl.rewards.sandbox.backends import Backend
from ptl.rewards.sandbox.canaries import choose
from ptl.rewards.sandbox.results import Job, Limits, RunResult, SandboxError
from ptl.rewards.sandbox.worker import Worker


class Sandbox:
    """Runs programs that nobody has read, several at once; usable from many threads.

    Args:
        workers: programs that run at the same time; None takes this process's share of the processors: their number
            over the ranks on this node.
        backend: the way to lock programs in; None takes the strongest that held when it was tried.

    Raises ``SandboxUnavailableError`` where none holds on this machine.
    """

    def __init__(self, workers: int | None = None, backend: Backend | None = None) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers {workers}: expected 1 or more")
        self.backend = backend or choose()
        self.workers = workers or max(1, len(os.sched_getaffinity(0)) // _ranks_here())
        self._pid = os.getpid()
        self._all: set[Worker] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._free: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._free.put(None)  # a place; its process starts when it is needed

    def run(self, code: str, calls: Sequence[str] = (), limits: Limits | None = None) -> RunResult:
        """Runs ``code``, then evaluates each of ``calls`` in it, all in a fresh process.

        Raises ``SandboxError`` where the sandbox itself failed twice; what the program does never raises.
        """
        if self._closed or os.getpid() != self._pid:
            raise SandboxError("this sandbox is closed, or belongs to the process that this one was forked from")
        job = Job(code, tuple(calls), limits or Limits())
        worker = self._free.get()
        try:
            if worker is not None:
                try:
                    return worker.run(job)
                except SandboxError:
                    self._forget(worker)  # it may have died since its last program; a new one is the judge
            worker = self._start()
            return worker.run(job)
        except SandboxError:
            self._forget(worker)
            worker = None
            raise
        finally:
            self._free.put(worker)

    def map(self, jobs: Iterable[Job]) -> list[RunResult | SandboxError]:
        """Runs programs, as many at once as there are workers; in order, results or what the sandbox failed with."""

        def one(job: Job) -> RunResult | SandboxError:
            try:
                return self.run(*job)
            except SandboxError as failure:
                return failure

        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(one, jobs))

    def close(self) -> None:
        """Kills the processes inside. Programs that still run give ``SandboxError``."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        with self._lock:
            workers, self._all = self._all, set()
        for worker in workers:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> Worker:
        worker = Worker(self.backend)
        with self._lock:
            self._all.add(worker)
        return worker

    def _forget(self, worker: Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._all.discard(worker)


_shared: list[Sandbox] = []
_sharing = threading.Lock()


def shared() -> Sandbox:
    """The sandbox of this process, made when it is first asked for. Raises ``SandboxUnavailableError``."""
    with _sharing:
        if _shared and _shared[0]._pid != os.getpid():
            _shared.clear()  # a fork has its parent's list, and must have workers of its own
        if not _shared:
            sandbox = Sandbox()
            atexit.register(sandbox.close)
            _shared.append(sandbox)
        return _shared[0]


def run_code(code: str, calls: Sequence[str] = (), limits: Limits | None = None) -> RunResult:
    """Runs a program that nobody has read, then evaluates ``calls`` in it.

    >>> run_code("def double(x): return 2 * x", ["double(4)"]).calls[0].value
    8

    It runs in a fresh process without network, files, environment or other processes; what it prints is lost. Raises
    ``SandboxUnavailableError`` where this machine offers no way to lock it in, ``SandboxError`` where the sandbox
    failed.
    """
    return shared().run(code, calls, limits)


def _ranks_here() -> int:
    """Processes of this run on this node, as far as its launcher says; too many rather than too few."""
    said = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE"))
    return next((int(value) for value in said if value.isdigit() and int(value) > 0), 1)
