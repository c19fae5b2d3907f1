"""Runs in W&B's own files (``run-ID.wandb``), which hold all of a run whether or not it was ever sent to a server.

A file is a LevelDB log (blocks of 32 KiB, chunks with length and kind) of protobuf records, whose message types the
``wandb`` package brings. A file that a kill tore is read up to the tear. A resumed run has a file an attempt, joined
here by ``trainer/global_step``: each file's own ``_step`` begins at 0 again.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptl.apps.comparing.configs import flatten, parse_config, run_digest
from ptl.apps.comparing.folders import facts_of, last_step
from ptl.apps.comparing.rows import Block, joined, metrics_of
from ptl.apps.comparing.runs import UNFINISHED, Metric, Run

STEP = "trainer/global_step"
AXES = (STEP, "trainer/tokens_seen")
"""The x-axes of W&B's charts, which stand in each row and are no metrics."""
_IDENTITY, _BLOCK = b":W&B", 1 << 15
_HEADER = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_SUMMARY = 3  # number of this field in Record


@dataclass
class Fragment:
    """What one file says, as it is read."""

    path: Path
    run_id: str = ""
    name: str = ""
    started: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    rows: list[dict[str, float]] = field(default_factory=list)


def need_wandb() -> None:
    """Raises ``ValueError`` where the wandb package is missing."""
    from importlib.util import find_spec

    if find_spec("wandb") is None:
        raise ValueError("got W&B runs, expected run folders where wandb is not installed: pip install wandb")


def run_id_of(path: Path) -> str:
    """The id in a file's name, ``run-ID.wandb``: files with one id are fragments of one run."""
    return path.stem.removeprefix("run-")


def read_wandb(paths: list[Path]) -> Run:
    """Reads the files of one run.

    Raises:
        ValueError: a file is not W&B's.
        OSError: a file cannot be read.
    """
    fragments = sorted((read_fragment(path) for path in paths), key=lambda fragment: fragment.started)
    config, summary = {}, {}
    for fragment in fragments:
        config.update(fragment.config)
        summary.update(fragment.summary)
    last = fragments[-1]
    log = joined([block_of(fragment.rows, resumed=i > 0) for i, fragment in enumerate(fragments)])
    status = summary.get("run/status") if last.exit_code is not None else UNFINISHED
    return wandb_run(
        config,
        summary,
        metrics_of(log),
        name=last.name,
        where=str(last.path.parent),
        source="wandb",
        status=str(status or ("finished" if last.exit_code == 0 else "failed")),
        wandb_id=last.run_id or run_id_of(last.path),
        attempts=len(fragments),
    )


def wandb_run(
    config: dict[str, Any],
    summary: dict[str, Any],
    metrics: dict[str, Metric],
    *,
    name: str,
    where: str,
    source: str,
    status: str,
    wandb_id: str,
    attempts: int | None = None,
) -> Run:
    """A run out of what W&B keeps of it.

    Its configuration is nested, with facts of the run under ``facts``, or one text where Lightning's own logger was
    used.
    """
    text = config.get("config")
    text = text if isinstance(text, str) else ""
    given = {key: value for key, value in config.items() if key.partition(".")[0] not in ("config", "_wandb", "facts")}
    flat = {**flatten(given), **parse_config(text)}
    folder = flat.get("run.dir")
    throughput = {
        key.removeprefix("run/throughput/"): value for key, value in summary.items() if key.startswith("run/throughput")
    }
    wall, devices = summary.get("run/wall_seconds_all_attempts"), summary.get("run/devices")
    seconds = wall if wall is not None else summary.get("_runtime")
    return Run(
        name=name or (Path(folder).name if folder else "") or wandb_id,
        where=where,
        source=source,
        status=status,
        config=flat,
        metrics=metrics,
        facts=facts_of(throughput, metrics, seconds, devices, summary.get("run/device_hours")),
        error=summary.get("run/error"),
        attempts=summary.get("run/attempts", attempts),
        devices=devices,
        step=summary.get("run/global_step", last_step(metrics)),
        monitor=summary.get("run/monitor"),
        wandb_id=wandb_id,
        wall=float(wall) if wall is not None else None,
        digest=run_digest(text, flat),
    )


def block_of(rows: list[dict[str, float]], *, resumed: bool = False) -> Block:
    """Rows of history as a block with the column ``step``; a resumed fragment makes void what it writes again."""
    import numpy as np

    found: dict[str, tuple[list[int], list[float]]] = {}
    first, count = None, int(resumed)
    for row in rows:
        step = row.get(STEP, row.get("_step"))
        if step is None or step != step:
            continue
        values = {name: value for name, value in row.items() if name not in AXES and name[0] != "_"}
        if not values:
            continue
        first = step if first is None else min(first, step)
        for name, value in {**values, "step": step}.items():
            at, kept = found.setdefault(name, ([], []))
            at.append(count)
            kept.append(value)
        count += 1
    columns = {name: (np.array(at, dtype=np.int64), np.array(kept)) for name, (at, kept) in found.items()}
    return Block(count, columns, [(0, int(first))] if resumed and first is not None else [])


# ---- the file ----


def read_fragment(path: Path) -> Fragment:
    """Reads one file up to its end, or to where it is torn."""
    from wandb.proto import wandb_internal_pb2

    record_type: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]
    found, runtime = Fragment(path), b""
    for data in _records(path):
        if _field(data) == _SUMMARY and b"run/" not in data:
            runtime = data  # W&B repeats each row of history as a summary: only the last tells more
            continue
        _take(record_type.FromString(data), found)
    if runtime:
        _take(record_type.FromString(runtime), found)
    return found


def _take(record: Any, found: Fragment) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "history":
        found.rows.append(_numbers(record.history.item))
    elif kind == "summary":
        found.summary.update(_values(record.summary.update))
    elif kind == "config":
        found.config.update(_values(record.config.update))
    elif kind == "exit":
        found.exit_code = record.exit.exit_code
    elif kind == "run":
        found.run_id, found.name = record.run.run_id, record.run.display_name
        found.started = record.run.start_time.seconds + record.run.start_time.nanos / 1e9
        found.config.update(_values(record.run.config.update))


def _records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if data[:4] != _IDENTITY:
        if not data:
            return  # killed before its first block was written
        raise ValueError(f"{path} is no W&B file: got {data[:4]!r} at its start, expected {_IDENTITY!r}")
    at, parts = 7, []
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:
            at += left
            continue
        checksum, length, kind = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        chunk = data[at : at + length]
        at += length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or checksum != zlib.crc32(chunk, zlib.crc32(bytes([kind]))):
            return
        parts = [chunk] if kind in (_FULL, _FIRST) else [*parts, chunk]
        if kind in (_FULL, _LAST):
            yield b"".join(parts)


def _field(data: bytes) -> int:
    """Number of the first field after ``num`` (field 1), without a parse: 0 where there is none."""
    at = 0
    if data[:1] == b"\x08":
        at = 1
        while at < len(data) and data[at] & 0x80:
            at += 1
        at += 1
    return data[at] >> 3 if at < len(data) and data[at] < 0x80 else 0


def _numbers(items: Any) -> dict[str, float]:
    """The numbers of a row, by name; tables and media are left out."""
    out = {}
    for item in items:
        nested = item.nested_key
        if len(nested) > 1:
            continue
        text = item.value_json
        try:
            out[nested[0] if nested else item.key] = float(text)
        except ValueError:
            if text in ('"NaN"', '"Infinity"', '"-Infinity"', '"nan"', '"inf"', '"-inf"', "true", "false"):
                out[nested[0] if nested else item.key] = float(text == "true") if text[0] != '"' else float(text[1:-1])
    return out


def _values(items: Any) -> dict[str, Any]:
    """Updates of a configuration or summary as a mapping; nested keys are joined by dots."""
    out = {}
    for item in items:
        key = ".".join(item.nested_key) if item.nested_key else item.key
        try:
            out[key] = json.loads(item.value_json)
        except ValueError:
            continue
    return out
