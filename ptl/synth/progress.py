"""Progress of a teacher's work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LINE_EVERY = 30.0
"""Seconds between two lines."""


class Progress:
    """Shows how far the work is; a context.

    Arguments:
        title: what is done.
        unit: what is counted.
        total: how many; None where nobody knows.
    """

    def __init__(self, title: str, unit: str, total: int | None) -> None:
        self.title, self.unit, self.total = title, unit, total
        self.done, self.began, self.told = 0, time.monotonic(), time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn(self.title), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, count: int) -> None:
        """More was done."""
        self.done += count
        rate = self.done / max(1e-9, time.monotonic() - self.began)
        text = f"{self.done:,} {self.unit}, {rate:,.1f} a second"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=text)
        elif time.monotonic() - self.told > LINE_EVERY:
            self.told = time.monotonic()
            sys.stderr.write(f"ptl synth: {self.title}: {text}\n")
            sys.stderr.flush()
