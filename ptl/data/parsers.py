"""Rows of the formats whose rows are not lines: Arrow tables, CSV and JSON arrays. One row in memory at a time."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from typing import IO, Any

import pyarrow as pa

from ptl.data.files import DataFile, UnreadableFile
from ptl.data.sources import BadRow

CHUNK = 1 << 20
LONGEST_ITEM = 64 << 20


def table_rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any] | BadRow]:
    """The rows of an Arrow batch as dicts.

    Arrow gives every struct all keys of its column, null where a row did not have them. Outside of messages those nulls
    are dropped, so that a tool call gets back the arguments it had; columns of the JSON type are read exactly.
    """
    walked = {field.name: field.type for field in batch.schema if _is_nested(field.type)}
    columns: dict[str, list[Any]] = {}
    for field, column in zip(batch.schema, batch.columns):
        try:
            columns[field.name] = column.to_pylist()
        except UnicodeDecodeError:
            columns[field.name] = [_cell(value) for value in column]
    for i in range(batch.num_rows):
        row = {name: values[i] for name, values in columns.items()}
        bad = next((value for value in row.values() if isinstance(value, BadRow)), None)
        try:
            yield bad or {name: _plain(v, walked[name]) if name in walked else v for name, v in row.items()}
        except ValueError:
            yield BadRow("broken_json", "a cell of a JSON column is not JSON")


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return BadRow("wrong_encoding", "a cell is not UTF-8")


def _is_nested(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) or isinstance(kind, pa.JsonType)


def _plain(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value) if isinstance(value, str) else value
    if pa.types.is_struct(kind):
        is_message = "role" in value or {"from", "value"} <= set(value)
        items = {name: _plain(value[name], kind.field(name).type) for name in value}
        return items if is_message else {name: item for name, item in items.items() if item is not None}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_plain(item, kind.value_type) for item in value]
    return value


def csv_rows(file: DataFile, stream: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any] | BadRow, int]]:
    """``(line of the row's start, row, bytes read)`` of a CSV file with a header. Every value is text.

    Raises:
        UnreadableFile: no header, or a quote that is never closed.
    """
    limit = csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        reader = csv.reader(text, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            raise UnreadableFile(file.shown, f"the header is {header}; expected distinct column names")
        start, position = reader.line_num + 1, 0
        while True:
            try:
                cells = next(reader, None)
                row = None if cells is None else _csv_row(header, cells)
            except csv.Error as error:
                if "end of data" in str(error):
                    raise UnreadableFile(
                        file.shown, f"the quote opened in the row of line {start} is not closed"
                    ) from None
                row = BadRow("broken_csv", str(error))
                cells = [""]
            if cells is None:
                return
            position += sum(map(len, cells)) + len(cells)
            if cells:
                yield start, row if row is not None else {}, position
            start = reader.line_num + 1
    except csv.Error as error:
        raise UnreadableFile(file.shown, f"the header cannot be read: {error}") from None
    finally:
        csv.field_size_limit(limit)
        text.detach()


def _csv_row(header: list[str], cells: list[str]) -> Mapping[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow("wrong_columns", f"the row has {len(cells)} cells; the header has {len(header)}")
    return dict(zip(header, cells))


def json_array_rows(file: DataFile, stream: IO[bytes]) -> Iterator[tuple[int, Mapping[str, Any] | BadRow, int]]:
    """``(number of the item from 1, row, bytes read)`` of a JSON array, decoded item by item.

    Raises:
        UnreadableFile: the array is broken: what follows cannot be told apart any more.
    """
    text = _TextWindow(file, stream)
    if text.next_char() != "[":
        raise UnreadableFile(file.shown, "it does not start with [; expected a JSON array of rows")
    text.skip(1)
    number = 1
    while (char := text.next_char()) != "]":
        if number > 1:
            if char != ",":
                raise UnreadableFile(file.shown, f"item {number - 1} of the JSON array is not followed by , or ]")
            text.skip(1)
        value = text.value(number)
        bad = BadRow("not_an_object", f"item {number} is a JSON {type(value).__name__}; expected an object")
        yield number, value if isinstance(value, dict) else bad, text.consumed
        number += 1


class _TextWindow:
    """A sliding window over the text of a stream, from which JSON values are taken one by one."""

    def __init__(self, file: DataFile, stream: IO[bytes]) -> None:
        self.file, self.stream = file, stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self.json = json.JSONDecoder()
        self.text, self.at, self.consumed, self.ended = "", 0, 0, False

    def fill(self, size: int = CHUNK) -> bool:
        """Reads on; False at the end of the stream."""
        if self.ended:
            return False
        raw = self.stream.read(size)
        self.ended, self.consumed = not raw, self.consumed + len(raw)
        self.text, self.at = self.text[self.at :] + self.decoder.decode(raw, final=self.ended), 0
        return not self.ended

    def next_char(self) -> str:
        """The next character that is not white space, not taken."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.fill():
                raise UnreadableFile(self.file.shown, "the JSON array is not closed by ]; the file may be cut")

    def skip(self, count: int) -> None:
        self.at += count

    def value(self, number: int) -> Any:
        """The next JSON value; the window grows until it holds it."""
        self.next_char()
        size = CHUNK
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
            except RecursionError:
                raise UnreadableFile(self.file.shown, f"item {number} of the JSON array is nested too deep") from None
            except ValueError as error:
                if len(self.text) > LONGEST_ITEM or not self.fill(size):
                    told = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise UnreadableFile(
                        self.file.shown, f"item {number} of the JSON array is broken: {told}"
                    ) from None
                size *= 2
                continue
            if isinstance(value, dict | list | str) or end < len(self.text):  # a number may go on in the next chunk
                self.at = end
                return value
            if not self.fill(size):
                raise UnreadableFile(self.file.shown, "the JSON array is not closed by ]; the file may be cut")
