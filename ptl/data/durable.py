"""Files that are whole or absent, and that stay after a power cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".partial"
"""Ending of a file that is being written; whatever carries it is not whole."""


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the rename itself stays atomic
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, *, writer: str = "") -> Iterator[Path]:
    """Gives a temporary path beside ``path``; what is written there takes the place of ``path`` at once at the end.

    The contents are on disk before the name changes. When the body raises, the temporary file is removed and what was
    at ``path`` stays untouched. Writers of one path at the same time each need a ``writer`` name of their own, which is
    part of the temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}{writer}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Adds one line to a text file with a single write.

    A former writer that was killed may have left a torn last line; it gets its newline first, so that the new line is
    whole and a reader loses the torn one only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode("utf-8") + b"\n")
