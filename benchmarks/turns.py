"""Loops that take turns step by step in one process, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping


class EndedError(RuntimeError):
    """Another loop has failed, and this one must not wait for its turn."""


class Turns:
    """Hands one turn around: whoever has it does one step, and the others wait.

    Attributes:
        seconds: of each name, what each of its turns took. The first one is its start-up.
        cpu_seconds: the same of all threads of this process, which a busy machine disturbs less.

    Arguments:
        names: who takes part, in the order of the turns.
        settle: called at the end of each turn, before its time is taken; waits for a device's queue.
    """

    def __init__(self, names: tuple[str, ...], settle: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
        self._settle = settle
        self._order = list(names)
        self._has = self._order[0]
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._began = (0.0, 0.0)

    def take(self, name: str) -> None:
        """Waits for the turn.

        Raises:
            EndedError: another loop has failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has == name or self._error is not None)
            if self._error is not None:
                raise EndedError(f"{name} stops: {self._error!r}")
        self._began = (time.perf_counter(), time.process_time())

    def give(self, name: str) -> None:
        """Ends a turn."""
        self._settle()
        self.seconds[name].append(time.perf_counter() - self._began[0])
        self.cpu_seconds[name].append(time.process_time() - self._began[1])
        self._pass_on(name)

    def leave(self, name: str) -> None:
        """Takes no more turns. What is left to do is done before the others go on."""
        self._pass_on(name)
        with self._changed:
            self._order.remove(name)

    def _pass_on(self, name: str) -> None:
        with self._changed:
            place = self._order.index(name)
            self._has = self._order[(place + 1) % len(self._order)]
            self._changed.notify_all()

    def run(self, loops: Mapping[str, Callable[[], None]]) -> None:
        """Runs every loop until its end: the first in this thread, which alone may take signals.

        Raises:
            Exception: what the first loop to fail has raised.
        """

        def whole(name: str) -> None:
            try:
                self.take(name)
                loops[name]()
                self.leave(name)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()

        first, *others = self._order
        threads = [threading.Thread(target=whole, args=(name,), name=name, daemon=True) for name in others]
        for thread in threads:
            thread.start()
        whole(first)
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
