"""``metrics.jsonl`` read into columns, fast: ten million rows are gigabytes of JSON.

Arrow parses a block of whole lines at once. It knows no NaN and no infinity, which stand in the file as strings; they
go through it as the three doubles at the ends of the range, which no metric reaches. A block that Arrow refuses (a
torn line inside it, a metric that is a number here and a word there) is read line by line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptl.apps.comparing.runs import Metric, bucket_width, metric

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 1 << 26
_PARSE_BLOCK = 1 << 20
_LARGEST = "1.7976931348623157e308"
_SECOND = "1.7976931348623155e308"
_WORDS = ((b'"nan"', _SECOND), (b'"-inf"', f"-{_LARGEST}"), (b'"inf"', _LARGEST))
_UNUSED = frozenset({"epoch", "time"})
_NOT_METRICS = frozenset({"step", "event"}) | _UNUSED
_TIME = re.compile(rb'"time": ([0-9.]+)')

Points = tuple["np.ndarray", "np.ndarray"]
"""int64 [N] and float64 [N]: rows, or steps, and the values there."""


@dataclass(frozen=True)
class Block:
    """Some rows of a log: how many, their numbers by name, and the rows where attempts start with how many steps."""

    rows: int
    columns: dict[str, Points]
    starts: list[tuple[int, int]]


def read_log(path: Path) -> dict[str, Points]:
    """Steps and values of each metric in ``metrics.jsonl``, as a run that was never killed would have logged them.

    Rows that a resumed attempt made void are left out, and lines that a kill tore.
    """
    return joined([parse(block) for block in _blocks(path)])


def read_times(path: Path) -> np.ndarray:
    """Times of all rows in seconds since 1970, float64 [N]."""
    import numpy as np

    return np.array([float(text) for block in _blocks(path) for text in _TIME.findall(block)])


def joined(blocks: list[Block]) -> dict[str, Points]:
    """Steps and values by metric of one log that stands in blocks.

    An attempt that starts with n steps done makes void what former ones wrote for step n and after.
    """
    import numpy as np

    offset, parts, starts = 0, {}, []
    for block in blocks:
        for name, (rows, values) in block.columns.items():
            parts.setdefault(name, []).append((rows + offset, values))
        starts += [(row + offset, step) for row, step in block.starts]
        offset += block.rows
    columns = {
        name: tuple(np.concatenate(kind) for kind in zip(*pieces, strict=True)) for name, pieces in parts.items()
    }
    steps = np.full(offset, -1, dtype=np.int64)
    if "step" in columns:
        rows, values = columns["step"]
        steps[rows] = np.where(np.isfinite(values), values, -1)
    for row, step in starts:
        steps[:row][steps[:row] >= step] = -1
        steps[row] = -1
    points = {}
    for name, (rows, values) in columns.items():
        at = steps[rows]
        kept = at >= 0
        if name not in _NOT_METRICS and kept.any():
            points[name] = (at, values) if kept.all() else (at[kept], values[kept])
    return points


def metrics_of(points: dict[str, Points]) -> dict[str, Metric]:
    """Every metric of a log, with curves in buckets of one width."""
    last = max((int(steps.max()) for steps, _ in points.values()), default=0)
    width = bucket_width(last)
    return {name: metric(steps, values, width) for name, (steps, values) in points.items()}


def parse(data: bytes) -> Block:
    """The numbers of whole lines of JSON objects."""
    table = _table(data)
    # Words are searched for only where there may be some: a search takes as long as a tenth of the parse.
    if (table is None or _has_words(table)) and (b'nan"' in data or b'inf"' in data):
        for word, number in _WORDS:
            data = data.replace(word, number.encode())
        table = _table(data)
    return _line_by_line(data) if table is None else _from_table(table)


def _table(data: bytes) -> Any:
    """Arrow's table of the lines, or None where it refuses them."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    options = arrow_json.ReadOptions(use_threads=False, block_size=max(_PARSE_BLOCK, _longest_line(data)))
    try:
        return arrow_json.read_json(pa.BufferReader(data), read_options=options)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _has_words(table: Any) -> bool:
    import pyarrow as pa

    return any(field.name != "event" and pa.types.is_string(field.type) for field in table.schema)


def _from_table(table: Any) -> Block:
    import numpy as np
    import pyarrow as pa

    columns: dict[str, Points] = {}
    for name in table.column_names:
        if name in _UNUSED:
            continue
        column = table.column(name).combine_chunks()
        if column.null_count == len(column):
            continue
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            if not pa.types.is_boolean(column.type):
                continue
            column = column.cast(pa.int8())
        if column.null_count:
            rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
            column = column.drop_null()
        else:
            rows = np.arange(len(column))
        columns[name] = (rows, _restored(column.to_numpy(zero_copy_only=False).astype(np.float64)))
    return Block(table.num_rows, columns, _starts(table, columns))


def _restored(values: np.ndarray) -> np.ndarray:
    """NaN and infinities for what stood for them."""
    import numpy as np

    if len(values) and abs(values).max() >= float(_SECOND):
        for number, stood_for in ((_SECOND, np.nan), (_LARGEST, np.inf), (f"-{_LARGEST}", -np.inf)):
            values = np.where(values == float(number), stood_for, values)
    return values


def _starts(table: Any, columns: dict[str, Points]) -> list[tuple[int, int]]:
    if "event" not in table.column_names or "step" not in columns:
        return []
    import numpy as np
    from pyarrow import compute

    rows, steps = columns["step"]
    started: Any = compute.call_function("equal", [table.column("event"), "start"])
    found = np.flatnonzero(started.fill_null(False).to_numpy())
    at = np.searchsorted(rows, found)
    return [(int(row), int(steps[i])) for row, i in zip(found, at, strict=True) if i < len(rows) and rows[i] == row]


def _line_by_line(data: bytes) -> Block:
    """The same without Arrow, for lines that are not all alike; what is no JSON object is left out."""
    import numpy as np

    found: dict[str, tuple[list[int], list[float]]] = {}
    starts, count = [], 0
    for line in data.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict):
            continue
        for name, value in row.items():
            if isinstance(value, int | float):
                rows, values = found.setdefault(name, ([], []))
                rows.append(count)
                values.append(float(value))
        if row.get("event") == "start" and isinstance(row.get("step"), int):
            starts.append((count, row["step"]))
        count += 1
    columns = {
        name: (np.array(rows, dtype=np.int64), _restored(np.array(values))) for name, (rows, values) in found.items()
    }
    return Block(count, columns, starts)


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines of a file, about ``_BLOCK`` bytes at a time; a last line without its end counts where it is JSON."""
    with path.open("rb") as file:
        rest = b""
        while data := file.read(_BLOCK):
            end = data.rfind(b"\n") + 1
            if not end:
                rest += data
                continue
            whole = data if end == len(data) else data[:end]
            yield rest + whole if rest else whole
            rest = data[end:]
        if rest.strip():
            try:
                json.loads(rest)
            except ValueError:
                return
            yield rest


def _longest_line(data: bytes) -> int:
    """Upper bound of a line's length, as a block of Arrow must hold one: exact only where lines are long."""
    longest, begin = 0, 0
    while begin < len(data):
        # From the first end of line after each quarter block to the next one: long lines cannot hide between them.
        end = data.find(b"\n", min(begin + _PARSE_BLOCK // 4, len(data)))
        end = len(data) if end < 0 else end
        longest = max(longest, end - begin)
        begin = end + 1
    return longest + 1
