"""A map over several processes that keeps the order and bounds the memory.

Processes are forked where the system can: they start at once, share the memory of the libraries, and on a cluster do
not all read them from a shared file system. What makes that safe here: they run before process groups and training
exist, and what they run is Python, Jinja, the tokenizer without its threads, numpy, and Arrow arrays, none of which
waits for a thread that the fork left behind.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST = 16
"""Processes taken where the user names no number."""

INLINE = 4
"""Tasks that are done before processes would have started."""


class WorkerError(RuntimeError):
    """A process died, or failed on something that is not the data."""


OUTLIVE_SECONDS = 600
"""How long a loader's process goes on after a SIGTERM: longer than a run takes to leave."""


def outlive_signals(_worker: int = 0, seconds: int = OUTLIVE_SECONDS) -> None:
    """For a loader's processes: SLURM signals them with their parent, which alone decides when they end.

    SIGTERM is heeded late instead of never, since Python waits at its exit for processes that it has sent one.
    """
    for name in ("SIGUSR1", "SIGUSR2", "SIGINT"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(seconds))


def processes(num_proc: int | None) -> int:
    """``num_proc``, else the cores that this process may use, at most ``MOST``.

    Raises:
        ValueError: ``num_proc`` is below 1.
    """
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc is {num_proc}; expected an integer >= 1, or null for the cores of this machine")
    return num_proc or min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


def in_order(work: Callable[[T], R], tasks: Iterable[T], num_proc: int, inline: int = INLINE) -> Iterator[R]:
    """``map(work, tasks)`` in several processes, results in the order of the tasks.

    Each process has one task at a time, and no more than ``3 * num_proc`` tasks are under way or waiting for their
    turn, so memory is bounded whatever the number of tasks. Up to ``inline`` tasks, or with one process, no process is
    started.

    Raises:
        ValueError: as ``work`` raised it.
        WorkerError: any other failure in a process, or its death.
    """
    tasks = iter(tasks)
    head = list(islice(tasks, inline + 1))
    queue = _chain(head, tasks)
    if num_proc <= 1 or len(head) <= inline:
        yield from map(work, queue)
        return
    forks = sys.platform == "linux" and "fork" in get_all_start_methods()
    context: Any = get_context("fork" if forks else "spawn")
    connections: list[Connection] = []
    workers = []
    try:
        for _ in range(num_proc):
            here, there = context.Pipe()
            connections.append(here)
            # A forked process closes its copies of this end, else it would outlive a killed parent.
            inherited = tuple(connections) if forks else ()
            workers.append(context.Process(target=_serve, args=(work, there, inherited), daemon=True))
            workers[-1].start()
            there.close()
        yield from _deal(connections, queue)
    finally:
        for connection in connections:
            connection.close()
        for worker in workers:
            worker.terminate()
            worker.join()


def _chain(head: list[T], tail: Iterator[T]) -> Iterator[T]:
    """``itertools.chain`` that lets go of the head's tasks as they are taken."""
    while head:
        yield head.pop(0)
    yield from tail


def _deal(connections: list[Connection], tasks: Iterator[Any]) -> Iterator[Any]:
    idle = list(connections)
    busy: dict[Any, int] = {}
    done: dict[int, Any] = {}
    given = taken = 0
    while True:
        while taken in done:
            yield done.pop(taken)
            taken += 1
        while idle and given - taken < 3 * len(connections) and (task := next(tasks, None)) is not None:
            connection = idle.pop()
            _send(connection, task)
            busy[connection] = given
            given += 1
        if not busy:
            return
        for connection in wait(list(busy)):
            done[busy.pop(connection)] = _receive(connection)
            idle.append(connection)  # pyright: ignore[reportArgumentType]


def _death() -> WorkerError:
    return WorkerError("a data process died, perhaps out of memory; try a smaller num_proc")


def _send(connection: Any, task: Any) -> None:
    try:
        connection.send(task)
    except (BrokenPipeError, ConnectionResetError):
        raise _death() from None


def _receive(connection: Any) -> Any:
    try:
        result, error, trace = connection.recv()
    except (EOFError, ConnectionResetError):
        raise _death() from None
    if isinstance(error, ValueError):
        raise error
    if error is not None:
        raise WorkerError(f"a data process failed:\n{trace}")
    return result


def _serve(work: Callable[[Any], Any], connection: Connection, inherited: tuple[Connection, ...]) -> None:
    """A process: one task in, one result out, until the other end closes."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = (work(task), None, "")
        except ValueError as error:
            answer = (None, ValueError(str(error)), "")
        except Exception as error:
            answer = (None, RuntimeError(type(error).__name__), traceback.format_exc())
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            return
