"""Files as rows: exact lines, one bad row at a time, every kind of file, bounded blocks."""

import csv
import gzip
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value

from ptl.data import readers
from ptl.data.files import HubData, UnreadableFile, file_identity, resolve
from ptl.data.readers import Beyond, ByteRange, blocks, file_blocks, first_rows
from ptl.data.sources import BadRow, Source


def read(path, **options):
    return [pair for block in blocks(Source(path=str(path), **options)) for pair in block.rows()]


def reasons(rows):
    return [row.reason if isinstance(row, BadRow) else row for _, row in rows]


def jsonl(path, rows, end="\n"):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + end for row in rows), encoding="utf-8")
    return path


def test_lines_are_counted_as_an_editor_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xc3\xa9 \\u2028"}\n{"a": "\xe2\x80\xa8"}\n[1]\n{"a": 2')
    assert [line for line, _ in read(path)] == [1, 4, 5, 6, 7]
    assert reasons(read(path)) == [{"a": 1}, {"a": "é \u2028"}, {"a": "\u2028"}, "not_an_object", "broken_json"]


def test_a_line_without_an_end_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert read(path) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize(
    ("raw", "reason", "told"),
    [
        (b'{"a": 1', "broken_json", "column 8"),
        (b"{'a': 1}", "broken_json", "column 2"),
        (b'{"a": "\xe9"}', "wrong_encoding", "byte 7"),
        ('{"a": "é"}'.encode("utf-16"), "wrong_encoding", "UTF-16"),
        (b"null", "not_an_object", "NoneType"),
        (b'"text"', "not_an_object", "str"),
        (b"[" * 100_000, "broken_json", "RecursionError"),
        (b"\x00\x01", "broken_json", "column 1"),
        (b'{"a": 1}{"a": 2}', "broken_json", "Extra data"),
        (b'{"a": ' + b"1" * 5000 + b"}", "broken_json", "ValueError"),
    ],
)
def test_law_8_a_bad_line_is_a_row_with_a_reason(tmp_path, raw, reason, told):
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    ((line, row),) = [pair for pair in read(path) if pair[0] == 1]
    assert line == 1 and isinstance(row, BadRow) and row.reason == reason and told in row.detail


def test_blocks_cover_a_file_once_and_share_it_by_byte_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROWS", 7)
    path = jsonl(tmp_path / "a.jsonl", [{"i": i, "t": "é" * (i % 5)} for i in range(100)], end="\n\n")
    made = list(blocks(Source(path=str(path))))
    assert all(isinstance(block.payload, ByteRange) and block.count <= 7 for block in made)
    assert sum(block.nbytes for block in made) == path.stat().st_size
    back = [pair for block in reversed(made) for pair in reversed(list(pickle.loads(pickle.dumps(block)).rows()))]
    assert [(line, row["i"]) for line, row in reversed(back)] == [(2 * i + 1, i) for i in range(100)]


def test_a_block_ends_at_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BYTES", 100)
    path = jsonl(tmp_path / "a.jsonl", [{"t": "x" * 60} for _ in range(5)])
    assert [block.count for block in blocks(Source(path=str(path)))] == [2, 2, 1]


def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(b"x" * 5000)
    with pytest.raises(UnreadableFile, match="line 1 is longer"):
        read(tmp_path / "a.jsonl")


ROWS = [{"i": i, "text": f"é{i}\nb"} for i in range(5)]


def write_every_kind(folder):
    jsonl(folder / "a.jsonl", ROWS)
    jsonl(folder / "lines.json", ROWS)
    (folder / "array.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    (folder / "flat.json").write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    with gzip.open(folder / "a.jsonl.gz", "wb") as file:
        file.write((folder / "a.jsonl").read_bytes())
    with gzip.open(folder / "b.json.gz", "wb") as file:
        file.write((folder / "array.json").read_bytes())
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    with zipfile.ZipFile(folder / "outer.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a.jsonl", "array.json", "a.parquet", "a.jsonl.gz"):
            archive.write(folder / name, f"in/{name}")


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "lines.json", "array.json", "flat.json", "a.jsonl.gz", "b.json.gz", "a.parquet"),
        *(f"zip://in/{name}::outer.whl" for name in ("a.jsonl", "array.json", "a.parquet", "a.jsonl.gz")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    write_every_kind(tmp_path)
    path = name.replace("::", f"::{tmp_path}/") if "::" in name else tmp_path / name
    assert read(path) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_csv_rows_are_named_by_the_line_they_start_on(tmp_path, suffix, separator):
    path = tmp_path / f"a.{suffix}"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["i", "text"], ["1", 'two\n"lines"'], [], ["2", "é" * 200_000], ["3", ""]])
    assert read(path) == [
        (2, {"i": "1", "text": 'two\n"lines"'}),
        (5, {"i": "2", "text": "é" * 200_000}),
        (6, {"i": "3", "text": ""}),
    ]
    assert csv.field_size_limit() == 131072


def test_law_8_bad_csv_rows_are_counted_one_by_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n1\n1,2,3\n"x"y,2\n\xe9,2\n3,4\n')
    rows = read(path)
    assert [line for line, _ in rows] == [2, 3, 4, 5, 6, 7]
    assert reasons(rows)[1:4] == ["wrong_columns", "wrong_columns", "broken_csv"]
    assert rows[4][1]["a"] == "\udce9" and rows[5][1] == {"a": "3", "b": "4"}


@pytest.mark.parametrize(
    ("name", "raw", "told"),
    [
        ("a.csv", b'a,b\n1,2\n"x,2\n3,4\n', "line 3 is not closed"),
        ("a.csv", b"", "header"),
        ("a.csv", b"a,a\n1,2\n", "header"),
        ("a.json", b'[{"a": 1}, {"a": 2', "item 2"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "item 1"),
        ("a.json", b'[{"a": 1}, {bad}]', "item 2"),
        ("a.json", b'[{"a": 1},', "cut"),
        ("a.json", b"[1, 23", "item 2|cut"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "end"),
        ("a.jsonl.gz", b"not gzip", "gzip"),
        ("a.json.gz", b"not gzip", "gzip"),
        ("a.parquet", b"PAR1 no", "read to its end"),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_an_error(tmp_path, name, raw, told):
    """The rows after the damage cannot even be counted, so no fraction of bad rows allows it."""
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UnreadableFile, match=told) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_a_json_array_is_read_through_any_window(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("ptl.data.parsers.CHUNK", chunk)
    values = [{"a": "é\n]["}, {"b": [1, {"c": None}]}, 1234, "str", {}, [], -5.5e3]
    (tmp_path / "a.json").write_text(" \n" + json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
    expected = [value if isinstance(value, dict) else "not_an_object" for value in values]
    assert reasons(read(tmp_path / "a.json")) == expected


CALLS = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "z", "w": [1]}}]


def test_trap_sft_15_arrow_nulls_are_not_arguments(tmp_path):
    """Arrow gives both rows the keys of both; what a row did not have must not come back as null."""
    rows = [{"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]} for call in CALLS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() != rows
    assert [row for _, row in read(tmp_path / "a.parquet")] == rows


def test_trap_sft_15_json_columns_keep_even_null_arguments(tmp_path):
    calls = [*CALLS, {"name": "h", "arguments": {"x": None}}]
    rows = [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]} for call in calls]
    message = {"role": Value("string"), "content": Value("string"), "tool_calls": Json()}
    dataset = Dataset.from_list(rows, features=Features({"messages": List(message)}))
    dataset.to_parquet(tmp_path / "a.parquet")
    assert [row for _, row in read(tmp_path / "a.parquet")] == rows
    hub = HubData("owner/name[train]", dataset)
    assert [row for block in file_blocks(hub) for _, row in block.rows()] == rows


def test_a_hub_data_set_is_read_by_row_in_its_own_order():
    dataset = Dataset.from_list([{"i": i} for i in range(1300)]).select(range(1299, -1, -1))
    hub, beyond = HubData("owner/name[train]", dataset), Beyond()
    made = list(file_blocks(hub, 1200, beyond))
    assert [block.count for block in made] == [512, 512, 176] and beyond.rows == 100
    pairs = [pair for block in made for pair in block.rows()]
    assert pairs[0] == (1, {"i": 1299}) and pairs[-1] == (1200, {"i": 100}) and len(pairs) == 1200


def test_a_parquet_cell_that_is_not_utf8_is_one_bad_row(tmp_path):
    column = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert reasons(read(tmp_path / "a.parquet")) == [{"text": "a"}, "wrong_encoding", {"text": "c"}]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b/2.jsonl", "a/9.jsonl", "10.jsonl", ".git/x.jsonl", "_tmp/y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / name, [{"name": name}])
    (tmp_path / "README.md").write_text("not data")
    assert [row["name"] for _, row in read(tmp_path)] == ["10.jsonl", "a/9.jsonl", "b/2.jsonl"]
    assert [file.shown for file in resolve(Source(path=str(tmp_path)))][1] == f"{tmp_path}/a/9.jsonl"
    assert [row["name"] for _, row in read(tmp_path / "[ab]" / "?.jsonl")] == ["a/9.jsonl", "b/2.jsonl"]


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("limit", [1, 4, 5, 6])
def test_law_8_rows_after_the_limit_are_counted(tmp_path, name, limit):
    write_every_kind(tmp_path)
    folder = tmp_path / "two"
    folder.mkdir()
    for number in "12":
        (folder / f"{number}-{name}").write_bytes((tmp_path / name).read_bytes())
    beyond = Beyond()
    made = list(blocks(Source(path=str(folder), limit=limit), beyond))
    assert sum(block.count for block in made) == sum(1 for block in made for _ in block.rows()) == limit
    assert beyond == Beyond(10 - limit, False)


def test_the_limit_counts_rows_and_not_blank_lines(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"i": i} for i in range(10)], end="\n\n\n")
    assert [row["i"] for _, row in read(path, limit=4)] == [0, 1, 2, 3]


def test_rows_after_the_limit_of_a_huge_file_are_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "COUNT_BEYOND", 10)
    path = jsonl(tmp_path / "a.jsonl", [{"i": 1}] * 100)
    beyond = Beyond()
    list(blocks(Source(path=str(path), limit=10), beyond))
    assert beyond == Beyond(90, True)


def test_first_rows_skip_what_cannot_be_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{bad\n{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert first_rows(Source(path=str(path)), 2) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere.jsonl", "no such file"),
        ("/nowhere/at/all", "no such file"),
        ("owner/no-such-data-set", "hub name"),
        ("s3://bucket/x.jsonl", "zip://"),
        ("zip://a.jsonl::nowhere.zip", "no archive"),
        ("no*such?.jsonl", "no file matches"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_clear_error(path, told):
    with pytest.raises(ValueError, match=told) as caught:
        resolve(Source(path=path))
    assert path in str(caught.value)


def test_paths_that_hold_no_data_are_clear_errors(tmp_path):
    write_every_kind(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    for path, told in [
        (tmp_path / "empty", "no data file"),
        (tmp_path / "a.txt", "suffix"),
        (f"zip://in/b.jsonl::{tmp_path}/outer.whl", "it has"),
        (f"zip://x::{tmp_path}/a.jsonl", "not a zip"),
    ]:
        with pytest.raises(ValueError, match=told):
            resolve(Source(path=str(path)))
    with pytest.raises(ValueError, match="split"):
        resolve(Source(path=str(tmp_path / "a.jsonl"), split="test"))


def test_the_identity_follows_the_content_of_small_files_and_samples_large_ones(tmp_path, monkeypatch):
    path, copy = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b"x" * 1000)
    copy.write_bytes(b"x" * 1000)
    assert file_identity(path) == file_identity(copy)
    path.write_bytes(b"x" * 999 + b"y")
    assert file_identity(path) != file_identity(copy)
    monkeypatch.setattr("ptl.data.files.SMALL", 100)
    monkeypatch.setattr("ptl.data.files.SAMPLE", 8)
    before = file_identity(path)
    assert file_identity(path) == before and len(before) == 3
    raw = bytearray(path.read_bytes())
    for at in (0, 999, 62):  # head, tail, a sample
        changed = bytes(raw[:at]) + b"z" + bytes(raw[at + 1 :])
        stat = path.stat()
        path.write_bytes(changed)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert file_identity(path)[:2] == before[:2] and file_identity(path) != before


HUB = """
import json, sys
from pathlib import Path
from datasets import Dataset, DatasetInfo
from datasets.arrow_writer import ArrowWriter
from ptl.data.files import resolve
from ptl.data.readers import blocks
from ptl.data.sources import Source
rows = [{"text": f"row {i}"} for i in range(3)]
folder = Path(sys.argv[1]) / "owner___name" / "small" / "0.0.0" / ("a" * 40)
folder.mkdir(parents=True)
features = Dataset.from_list(rows).features
with ArrowWriter(path=str(folder / "name-train.arrow"), features=features) as writer:
    for row in rows:
        writer.write(row)
    examples, size = writer.finalize()
split = {"name": "train", "num_examples": examples, "num_bytes": size, "dataset_name": "name"}
names = {"builder_name": "parquet", "dataset_name": "name", "config_name": "small", "version": "0.0.0"}
DatasetInfo(features=features, splits={"train": split}, **names).write_to_directory(str(folder))
source = Source(path="owner/name:small")
assert [row for block in blocks(source) for _, row in block.rows()] == rows
(file,) = resolve(source)
assert file.shown == "owner/name:small[train]" and file.identity() == resolve(source)[0].identity()
try:
    resolve(Source(path="owner/name:small", split="test"))
except ValueError as error:
    print(error)
"""


def test_a_hub_name_is_read_from_the_cache_of_datasets(tmp_path):
    """As a compute node without a network finds what the login node has downloaded."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert out.returncode == 0, out.stderr
    assert "owner/name:small" in out.stdout and "split 'test'" in out.stdout
