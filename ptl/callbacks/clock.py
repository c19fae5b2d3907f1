"""A stop-watch for optimizer steps that never waits for the device between two readings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch


class Clock(Protocol):
    """Marks moments; how far apart they are is known at ``read``."""

    def mark(self) -> int:
        """Remembers this moment and gives its number."""
        ...

    def read(self) -> list[float]:
        """Seconds of each mark after the first one; forgets them all but the last, which becomes number 0."""
        ...


class HostClock:
    """Moments of the process; right where work is done when the call returns, as on the CPU."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> int:
        self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def read(self) -> list[float]:
        seconds = [mark - self._marks[0] for mark in self._marks]
        del self._marks[:-1]
        return seconds


class CudaClock:
    """Moments of the current CUDA stream: when the work that was queued before the mark is done.

    A mark costs no wait; ``read`` waits once for the last one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> int:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)
        return len(self._marks) - 1

    def read(self) -> list[float]:
        if self._marks:
            self._marks[-1].synchronize()
        seconds = [self._marks[0].elapsed_time(mark) / 1000 for mark in self._marks]
        del self._marks[:-1]
        return seconds


class StepTimer:
    """Durations of optimizer steps with the pauses cut out, and how long the host waited for data.

    A step reaches from the end of the one before to its own end, so that data loading and hooks count. ``hold`` and
    ``release`` cut out what is not training; they nest.

    Arguments:
        clock: what the durations are read from.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start: int | None = None
        self._segments: list[tuple[int, int]] = []
        self._steps: list[list[tuple[int, int]]] = []
        self._holds = 0
        self._left: float | None = None
        self._waited = 0.0
        self._between = False

    @property
    def held(self) -> bool:
        """Whether time is being cut out."""
        return self._holds > 0

    @property
    def steps(self) -> int:
        """Steps closed since the last reading."""
        return len(self._steps)

    def batch_arrived(self) -> None:
        """The next batch is there; the host's wait for it ends."""
        if self._start is None and not self.held:
            self._start = self._clock.mark()
        self._stop_waiting()
        self._between = False

    def batch_done(self) -> None:
        """The batch is worked off; from here on the host waits for the next one."""
        self._between = True
        if not self.held:
            self._left = time.perf_counter()

    def step_done(self) -> None:
        """An optimizer step ends here and the next one starts."""
        if self._start is not None:
            mark = self._clock.mark()
            self._segments.append((self._start, mark))
            self._start = mark
        self._steps.append(self._segments)
        self._segments = []

    def hold(self) -> None:
        """What follows is not training."""
        self._holds += 1
        if self._holds == 1:
            self._stop_waiting()
            if self._start is not None:
                self._segments.append((self._start, self._clock.mark()))
                self._start = None

    def release(self) -> None:
        """Training goes on, once every hold is released."""
        self._holds -= 1
        if self._holds == 0:
            self._start = self._clock.mark()
            if self._between:
                self._left = time.perf_counter()

    def read(self) -> tuple[list[float], float]:
        """Seconds of each closed step and seconds of waiting since the last reading. Waits for the device once.

        Called right after ``step_done``, so that no step is open in part.
        """
        if not self._steps:
            return [], 0.0
        seconds = self._clock.read()
        durations = [sum(seconds[b] - seconds[a] for a, b in segments) for segments in self._steps]
        waited, self._waited = self._waited, 0.0
        self._steps = []
        self._segments = []
        if self._start is not None:
            self._start = 0
        return durations, waited

    def _stop_waiting(self) -> None:
        if self._left is not None:
            self._waited += time.perf_counter() - self._left
            self._left = None


def median_and_p90(durations: Sequence[float]) -> tuple[float, float]:
    """The middle and the 90th percentile (linear interpolation) of one or more numbers."""
    middle, high = torch.tensor(durations, dtype=torch.float64).quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))
    return float(middle), float(high)
