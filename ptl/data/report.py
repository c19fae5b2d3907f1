"""Progress of long data work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

LINE_EVERY = 30.0


class Report:
    """Shows how far the preparation is; a context. ``text`` is the last state in words.

    Arguments:
        total: bytes of data to read, an estimate.
        quiet: shows nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total, self.quiet = max(1, total), quiet
        self.rows = self.bytes = self.tokens = 0
        self.began = self.last = time.monotonic()
        self._bar = None

    @property
    def text(self) -> str:
        rate = self.rows / max(1e-9, time.monotonic() - self.began)
        share = min(1.0, self.bytes / self.total)
        return f"{self.rows:,} rows, {self.tokens:,} tokens, about {share:.0%}, {rate:,.0f} rows/s"

    def __enter__(self) -> Report:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("preparing data"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, *, rows: int, nbytes: int, tokens: int) -> None:
        """More was done."""
        self.rows, self.bytes, self.tokens = self.rows + rows, self.bytes + nbytes, self.tokens + tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self.bytes, text=self.text)
        elif not self.quiet and time.monotonic() - self.last > LINE_EVERY:
            self.last = time.monotonic()
            say(f"preparing data: {self.text}")


def say(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"ptl: {text}\n")
    sys.stderr.flush()
