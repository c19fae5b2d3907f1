"""``metrics.jsonl``: one JSON object for each log call, in the run folder."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from ptl.callbacks.redact import redact_tree
from ptl.data.durable import append_line

METRICS_FILE = "metrics.jsonl"
SYNC_SECONDS = 30.0


class JsonlLogger(Logger):
    """Appends every log call to ``RUN/metrics.jsonl`` as ``{"step", "epoch", "time", name: value, ...}``.

    ``step`` counts optimizer steps from 0 as Lightning's logs do, ``time`` is in seconds since 1970. A resumed run goes
    on in the same file, behind a row ``{"event": "start", "step": n}``; where a killed attempt had gone further than
    its last checkpoint, ``read_metrics`` leaves its superseded rows out. A line is written with one call, so that a
    killed process loses one line at most. Numbers that JSON lacks are the strings ``"nan"``, ``"inf"``, ``"-inf"``,
    which ``float`` reads.

    Arguments:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self._run_dir = Path(run_dir)
        self._synced = time.monotonic()

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._run_dir)

    @property
    def log_dir(self) -> str:
        return str(self._run_dir)

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self._run_dir / METRICS_FILE

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Appends one row; a media object or a table, which other loggers take, is left out."""
        values = {name: plain for name, value in metrics.items() if (plain := _plain(value)) is not None}
        epoch = values.pop("epoch", None)
        row = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **redact_tree(values)}
        append_line(self.path, json.dumps(row, allow_nan=False))

    @rank_zero_only
    def mark_start(self, step: int) -> None:
        """Notes that an attempt starts here, with ``step`` optimizer steps done: later rows of former ones are void."""
        append_line(self.path, json.dumps({"event": "start", "step": step, "time": round(time.time(), 3)}))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: ``config.yaml`` in the same folder holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Called after each log; brings the file to the disk every half minute, so that logging stays cheap."""
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self._sync()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._sync()

    def _sync(self) -> None:
        self._synced = time.monotonic()
        if self.path.exists():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())


def _plain(value: Any) -> float | int | str | bool | None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return None
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON-lines file in order; a line that a kill tore is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` as one run that was never killed would have written them.

    An attempt that starts with n steps done makes void what former attempts wrote for step n and after.
    """
    kept: list[dict[str, Any]] = []
    for row in read_rows(path):
        if row.get("event") == "start":
            kept = [r for r in kept if not isinstance(r.get("step"), int) or r["step"] < row["step"]]
        else:
            kept.append(row)
    return kept
