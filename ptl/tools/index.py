"""Full text search over documents that a person gives: an SQLite FTS5 index, made once and kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ptl.data.claim import made_once
from ptl.data.files import file_identity
from ptl.paths import cache_root

PASSAGE = 800
"""Characters of a passage; a longer paragraph is cut between sentences."""
FOUND = 3
"""Passages that a search gives."""
WORDS = 32
"""Words of a query that are looked for."""
_VERSION = 1
_TEXT = (".txt", ".md", ".rst")
_ROWS = (".jsonl", ".json", ".parquet", ".csv")


def index_of(path: Path) -> Path:
    """The index of a file or of a folder's files, made where it is not in the cache yet.

    Text files are cut at blank lines; of tables the columns ``text`` (or ``content``) and ``title`` are read. An
    index is kept under ``$PTL_CACHE/search`` (``~/.cache/ptl/search``) by the files' names, sizes and times.

    Raises:
        ValueError: there is no such file, or nothing to read in it.
    """
    if path.suffix == ".sqlite" and path.is_file():
        return path
    files = _files(path)
    parts = [_VERSION, *(file_identity(file) for file in files)]
    key = hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=12).hexdigest()
    root = cache_root() / "search"
    root.mkdir(parents=True, exist_ok=True)
    made_once(root / key, lambda folder, claim: _make(files, folder))
    return root / key / "index.sqlite"


def search(query: str, index: str) -> str:
    """The passages that fit best, with the names of their documents.

    Args:
        query: any text; its words are looked for, whatever signs are between them.
        index: file that ``index_of`` gave.

    Raises:
        ValueError: there is no word in the query.
    """
    words = list(dict.fromkeys(re.findall(r"\w+", query.lower())))[:WORDS]
    if not words:
        raise ValueError("the query holds no word")
    asked = " OR ".join(f'"{word}"' for word in words)
    with contextlib.closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as store:
        rows = store.execute(
            "SELECT title, text FROM passages WHERE passages MATCH ? ORDER BY bm25(passages, 2.0, 1.0), rowid LIMIT ?",
            (asked, FOUND),
        ).fetchall()
    if not rows:
        return "No passage was found."
    return "\n".join(f"[{number}] {title}: {text}" for number, (title, text) in enumerate(rows, 1))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there are no documents at {path}; expected a file or a folder")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in (*_TEXT, *_ROWS))
    if not files:
        raise ValueError(f"{path} holds no documents; expected files that end in {', '.join((*_TEXT, *_ROWS))}")
    return files


def _make(files: list[Path], folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as store:
        store.execute('CREATE VIRTUAL TABLE passages USING fts5(title, text, tokenize="unicode61 remove_diacritics 2")')
        count = 0
        for title, text in (pair for file in files for pair in _documents(file)):
            rows = [(title, passage) for passage in _passages(text)]
            store.executemany("INSERT INTO passages VALUES (?, ?)", rows)
            count += len(rows)
        store.execute("INSERT INTO passages(passages) VALUES ('optimize')")
        store.commit()
    if not count:
        raise ValueError(f"no text was found in {', '.join(map(str, files[:3]))}")


def _documents(file: Path) -> Iterator[tuple[str, str]]:
    """Title and text of each document in a file."""
    if file.suffix not in _ROWS:
        yield file.stem, file.read_text(encoding="utf-8", errors="replace")
        return
    from ptl.data.readers import rows_of
    from ptl.data.sources import BadRow, Source

    for origin, row in rows_of(Source(path=str(file))):
        if isinstance(row, BadRow):
            raise ValueError(f"{file}:{origin.line}: {row}")
        text = row.get("text") or row.get("content")
        if not isinstance(text, str):
            raise ValueError(f"{file}:{origin.line} has no text; expected a column text or content, got {sorted(row)}")
        yield str(row.get("title") or file.stem), text


def _passages(text: str) -> Iterator[str]:
    """Paragraphs, none longer than ``PASSAGE`` where it can be cut between sentences or words."""
    for paragraph in re.split(r"\n\s*\n", text):
        rest = " ".join(paragraph.split())
        while len(rest) > PASSAGE:
            cut = max(rest.rfind(". ", 0, PASSAGE) + 1, 0) or max(rest.rfind(" ", 0, PASSAGE), 0) or PASSAGE
            yield rest[:cut].strip()
            rest = rest[cut:].strip()
        if rest:
            yield rest
