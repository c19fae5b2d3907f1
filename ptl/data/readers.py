"""From a source to blocks of rows that a worker process can read: bounded memory, exact lines, one bad row at a time.

A ``Block`` is a small picklable job of at most ``ROWS`` rows. The process that plans walks each file once, at line
ends, and hands out byte ranges of plain JSONL files, so that many processes share one file; of compressed files it
hands out the lines themselves, of tables an Arrow batch, of CSV and JSON arrays the parsed rows, of generated data the
indices. ``Block.rows`` yields ``(line, row)`` with a ``BadRow`` in place of a row that cannot be read.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from ptl.data.files import AnyFile, DataFile, Files, HubData, UnreadableFile, resolve
from ptl.data.gym import GymData, GymRange
from ptl.data.parsers import csv_rows, json_array_rows, table_rows
from ptl.data.sources import BadRow, Source
from ptl.types import Origin

ROWS = 512
BYTES = 2 << 20
"""A block ends at whichever comes first."""
LONGEST_LINE = 256 << 20
COUNT_BEYOND = 2 << 30
"""Rows after ``limit`` are counted exactly in files up to this many bytes, and estimated in larger ones."""

Row = Mapping[str, Any] | BadRow


@dataclass(frozen=True)
class ByteRange:
    """``size`` bytes of a plain file from ``offset``, whole lines."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Block:
    """A job of up to ``ROWS`` rows of one file.

    Attributes:
        file: the file as shown to the user.
        first: 1-based line (text) or row (table, JSON array, generated data) of the first row.
        count: rows inside, blank lines not counted.
        nbytes: bytes of the file that the block covers, for progress.
        payload: where the rows are.
    """

    file: str
    first: int
    count: int
    nbytes: int
    payload: ByteRange | bytes | pa.RecordBatch | list[tuple[int, Row]] | GymRange

    def rows(self) -> Iterator[tuple[int, Row]]:
        """``(line, row or BadRow)``, in order."""
        if isinstance(self.payload, list):
            yield from self.payload
        elif isinstance(self.payload, GymRange):
            yield from self.payload.rows()
        elif isinstance(self.payload, pa.RecordBatch):
            yield from enumerate(table_rows(self.payload), self.first)
        else:
            text = self.payload.read() if isinstance(self.payload, ByteRange) else self.payload
            for line, raw in enumerate(text.split(b"\n"), self.first):
                if raw and not raw.isspace():
                    yield line, parse_line(raw, first=line == 1)


@dataclass
class Beyond:
    """Rows that ``limit`` left out: how many, and whether the number is an estimate."""

    rows: int = 0
    estimated: bool = False


def parse_line(raw: bytes, *, first: bool = False) -> Row:
    """One line of JSONL. A byte order mark is allowed on the first line."""
    if first and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return BadRow("wrong_encoding", "the file starts with a UTF-16 mark; save it as UTF-8")
    try:
        row = json.loads(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("wrong_encoding", f"byte {error.start} of the line is not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        return BadRow("broken_json", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow("broken_json", type(error).__name__)
    return as_row(row)


def as_row(value: Any) -> Row:
    """A parsed JSON value as a row."""
    if isinstance(value, dict):
        return value
    return BadRow("not_an_object", f"the row is a JSON {type(value).__name__}; expected an object")


def blocks(source: Source, beyond: Beyond | None = None, files: Files | None = None) -> Iterator[Block]:
    """The rows of a source in order, as blocks.

    Args:
        source: the source; its ``limit`` counts rows, good or bad.
        beyond: filled with the number of rows after ``limit``.
        files: the source's files where they were resolved already.

    Raises:
        ValueError: the path leads to no data, or a file cannot be read to its end.
    """
    left = source.limit
    for file in resolve(source) if files is None else files:
        for block in file_blocks(file, left, beyond):
            left = None if left is None else left - block.count
            yield block


def rows_of(source: Source, files: Files | None = None) -> Iterator[tuple[Origin, Row]]:
    """The rows of a source in order, each with its file and line; arguments and errors as for ``blocks``."""
    for block in blocks(source, files=files):
        for line, row in block.rows():
            yield Origin(block.file, line), row


def file_blocks(file: AnyFile, limit: int | None = None, beyond: Beyond | None = None) -> Iterator[Block]:
    """The first ``limit`` rows of one file, as blocks. The rows after them are counted in ``beyond``."""
    beyond = beyond if beyond is not None else Beyond()
    try:
        if isinstance(file, GymData):
            yield from _gym_blocks(file, limit, beyond)
        elif isinstance(file, HubData) or file.kind == "parquet":
            yield from _table_blocks(file, limit, beyond)
        elif file.kind == "jsonl":
            yield from _line_blocks(file, limit, beyond)
        else:
            yield from _row_blocks(file, limit, beyond)
    except (EOFError, OSError, zlib.error, zipfile.BadZipFile, pa.ArrowException) as error:
        raise UnreadableFile(file.shown, f"it cannot be read to its end ({error})") from error


def _table_blocks(file: DataFile | HubData, limit: int | None, beyond: Beyond) -> Iterator[Block]:
    total = file.num_rows()
    wanted = total if limit is None else min(limit, total)
    beyond.rows += total - wanted
    per_row = file.nbytes / max(1, total)
    done = 0
    if not wanted:
        return
    for batch in file.batches(ROWS):
        batch = batch.slice(0, min(batch.num_rows, wanted - done))
        yield Block(file.shown, done + 1, batch.num_rows, round(per_row * batch.num_rows), batch)
        done += batch.num_rows
        if done >= wanted:
            return


def _gym_blocks(file: GymData, limit: int | None, beyond: Beyond) -> Iterator[Block]:
    total = file.num_rows()
    wanted = total if limit is None else min(limit, total)
    beyond.rows += total - wanted
    for part in file.parts(wanted):
        yield Block(file.shown, part.start + 1, part.count, part.nbytes, part)


def _line_blocks(file: DataFile, limit: int | None, beyond: Beyond) -> Iterator[Block]:
    """Walks the lines once. Plain files give byte ranges, streams give the lines."""
    ranged = file.is_plain
    left = limit
    with file.open() as stream:
        offset, line = 0, 1
        while left is None or left > 0:
            lines: list[bytes] = []
            size = count = number = 0
            most = ROWS if left is None else min(ROWS, left)
            while count < most and size < BYTES and (raw := stream.readline(LONGEST_LINE)):
                if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                    raise UnreadableFile(file.shown, f"line {line + number} is longer than {LONGEST_LINE >> 20} MiB")
                size, number = size + len(raw), number + 1
                count += not raw.isspace()
                if not ranged:
                    lines.append(raw)
            if not size:
                return
            payload = ByteRange(file.path, offset, size) if ranged else b"".join(lines)
            if count:
                yield Block(file.shown, line, count, size, payload)
            offset, line = offset + size, line + number
            left = None if left is None else left - count
        _count_rest(file, stream, offset, line, beyond)


def _count_rest(file: DataFile, stream: Any, offset: int, line: int, beyond: Beyond) -> None:
    if file.nbytes - offset <= COUNT_BEYOND:
        beyond.rows += sum(not raw.isspace() for raw in iter(lambda: stream.readline(LONGEST_LINE), b""))
    else:
        beyond.rows += round((file.nbytes - offset) * max(1, line - 1) / max(1, offset))
        beyond.estimated = True


def _row_blocks(file: DataFile, limit: int | None, beyond: Beyond) -> Iterator[Block]:
    """CSV and JSON arrays, whose rows are not lines: parsed here, one process a file."""
    with file.open() as stream:
        rows = csv_rows(file, stream) if file.kind in ("csv", "tsv") else json_array_rows(file, stream)
        batch: list[tuple[int, Row]] = []
        taken = size = start = 0
        for line, row, position in rows:
            if limit is not None and taken >= limit:
                beyond.rows += 1
                continue
            batch.append((line, row))
            taken, size = taken + 1, position - start
            if len(batch) >= ROWS or size >= BYTES:
                yield Block(file.shown, batch[0][0], len(batch), size, batch)
                batch, start, size = [], position, 0
        if batch:
            yield Block(file.shown, batch[0][0], len(batch), size, batch)


def first_rows(source: Source, count: int = 32, files: Files | None = None) -> list[Mapping[str, Any]]:
    """The first readable rows of a source, for telling its format."""
    return list(islice((row for _, row in rows_of(source, files) if not isinstance(row, BadRow)), count))
