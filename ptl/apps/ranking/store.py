"""Rankings in an append-only JSONL file. What ``add`` returned is on disk, whatever happens next.

A row is written whole and synced before ``add`` returns. Writers that wait at the same time share one sync. A writer
that was killed can leave one torn last line, which nobody was told of; it is cut off when the file is opened again.
One process at a time writes a file.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ptl.apps.ranking.prompts import Item, content_digest, json_object
from ptl.apps.ranking.settle import settle
from ptl.data.durable import sync_folder
from ptl.data.sources import BadRow

STATUSES = ("ranked", "skipped", "flagged")


class KeyReused(ValueError):  # noqa: N818  (as BadRow: a verdict on a request)
    """An annotator sent one idempotency key for two prompts."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an annotator last said of a prompt.

    Attributes:
        annotator: name.
        id: the prompt's.
        status: one of ``STATUSES``.
        ranks: a number from 1 for each answer in the order of the file, equal is a tie, None is unranked.
        order: the answer of the file at each place shown.
        seconds: how long the prompt was looked at.
        flag: why it was flagged, or None.
        revision: 1 for the first verdict of this annotator on this prompt, then 2, ...
    """

    annotator: str
    id: str
    status: str
    ranks: tuple[int | None, ...]
    order: tuple[int, ...]
    seconds: float
    flag: str | None = None
    revision: int = 1


@dataclass
class _Entry:
    """A row on its way to the disk."""

    verdict: Verdict
    key: tuple[str, str]
    line: bytes
    done: bool = False
    error: OSError | None = None


class Store:
    """The output file and what it says so far. Safe to use from several threads.

    Args:
        path: the JSONL file; made where it is absent.
        items: what is ranked.

    Raises:
        ValueError: another process writes the file, or a whole line of it is not a ranking of these items.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self.path = path
        self.items = {item.id: item for item in items}
        self.strangers = 0
        """Rows of the file about prompts that are not in ``items``."""
        self._latest: dict[str, dict[str, Verdict]] = {item.id: {} for item in items}
        self._keys: dict[tuple[str, str], _Entry | Verdict] = {}
        self._revisions: dict[tuple[str, str], int] = {}
        self._queue: list[_Entry] = []
        self._state = threading.Lock()
        self._writing = threading.Lock()
        self._torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
            self._size = self._load()
            sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def add(
        self,
        item: Item,
        *,
        annotator: str,
        key: str,
        status: str,
        ranks: Sequence[int | None],
        order: Sequence[int],
        seconds: float,
        flag: str | None = None,
    ) -> Verdict:
        """Appends a verdict and returns it once it is on disk.

        Args:
            item: the prompt.
            annotator: name.
            key: the sender's name of this verdict: sent again, it gives the verdict it gave before and writes nothing.
            status: one of ``STATUSES``.
            ranks: as in ``Verdict``.
            order: as in ``Verdict``.
            seconds: as in ``Verdict``.
            flag: as in ``Verdict``.

        Raises:
            OSError: it could not be written; nothing of it is in the file, and the key may be sent again.
            KeyReused: the annotator sent this key for another prompt.
        """
        with self._state:
            known = self._keys.get((annotator, key))
            if known is None:
                known = self._enqueue(item, (annotator, key), status, tuple(ranks), tuple(order), seconds, flag)
        verdict = known if isinstance(known, Verdict) else known.verdict
        if verdict.id != item.id:
            raise KeyReused(f"key {key!r} was sent for prompt {verdict.id!r} before, now for {item.id!r}")
        if isinstance(known, _Entry):
            self._commit(known)
        return verdict

    def last(self, annotator: str, prompt: str) -> Verdict | None:
        """The last verdict of an annotator on a prompt, by its id."""
        return self._latest[prompt].get(annotator)

    def verdicts(self) -> dict[str, dict[str, Verdict]]:
        """Last verdicts by prompt and annotator, as they are now."""
        with self._state:
            return {prompt: dict(given) for prompt, given in self._latest.items()}

    def count(self) -> tuple[int, int]:
        """Verdicts that stand, and annotators who gave them."""
        given = [name for of_prompt in self.verdicts().values() for name in of_prompt]
        return len(given), len(set(given))

    def close(self, *, settled: bool = False) -> None:
        """Closes the file; what was added is on disk already. ``settled`` marks what was revised."""
        if self._file >= 0:
            if settled:
                settle(self.path)
            os.close(self._file)
            self._file = -1

    # ---- writing ----

    def _enqueue(
        self,
        item: Item,
        key: tuple[str, str],
        status: str,
        ranks: tuple[int | None, ...],
        order: tuple[int, ...],
        seconds: float,
        flag: str | None,
    ) -> _Entry:
        place = (key[0], item.id)
        self._revisions[place] = revision = self._revisions.get(place, 0) + 1
        verdict = Verdict(
            annotator=key[0],
            id=item.id,
            status=status,
            ranks=ranks,
            order=order,
            seconds=seconds,
            flag=flag,
            revision=revision,
        )
        entry = _Entry(verdict, key, _line(item, verdict, key[1]))
        self._keys[key] = entry
        self._queue.append(entry)
        return entry

    def _commit(self, entry: _Entry) -> None:
        """Waits until an entry is on disk. Whoever gets to write takes all that wait, so that they share the sync."""
        with self._writing:
            if not entry.done:
                with self._state:
                    batch, self._queue = self._queue, []
                error: OSError | None = None
                try:
                    self._append(b"".join(each.line for each in batch))
                except OSError as failure:
                    error = failure
                with self._state:
                    for each in batch:
                        each.done, each.error = True, error
                        if error is not None:
                            del self._keys[each.key]
                        else:
                            self._keys[each.key] = each.verdict
                            self._latest[each.verdict.id][each.verdict.annotator] = each.verdict
        if entry.error is not None:
            raise OSError(entry.error.errno, f"{self.path}: not saved ({entry.error.strerror})") from entry.error

    def _append(self, data: bytes) -> None:
        if self._torn:
            os.ftruncate(self._file, self._size)
        self._torn = True
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            self._torn = False
            raise
        self._torn = False
        self._size += len(data)

    # ---- opening ----

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is written by another ptl rank serve; stop it or give another --out"
            ) from None
        except OSError:
            pass  # some network file systems have no locks

    def _load(self) -> int:
        """Reads the file, cuts a torn end off, and returns its size."""
        size = 0
        with open(self.path, "rb") as file:
            for number, raw in enumerate(file, 1):
                whole = raw.endswith(b"\n")
                try:
                    if not raw.isspace():
                        self._take(json_object(raw))
                except BadRow as bad:
                    if whole:
                        raise ValueError(f"{self.path}:{number}: {bad}") from None
                    os.ftruncate(self._file, size)
                    os.fsync(self._file)
                    print(f"ptl rank: {self.path}: cut off a torn last line of {len(raw)} bytes", file=sys.stderr)
                    return size
                if not whole:
                    os.write(self._file, b"\n")
                    os.fsync(self._file)
                size += len(raw) + (not whole)
        return size

    def _take(self, row: Mapping[str, Any]) -> None:
        """Remembers a row of the file."""
        try:
            verdict = Verdict(
                annotator=row["annotator"],
                id=row["id"],
                status=row["status"],
                ranks=tuple(answer["rank"] for answer in row["completions"]),
                order=tuple(row["order"]),
                seconds=float(row["seconds"]),
                flag=row["flag"],
                revision=int(row["revision"]),
            )
            key, content = (verdict.annotator, row["key"]), content_digest(row)
        except (KeyError, TypeError, ValueError) as error:
            raise BadRow("bad_ranking", f"the row was not written by ptl rank serve ({error!r})") from None
        if verdict.id not in self.items:
            self.strangers += 1
            return
        item = self.items[verdict.id]
        if content != item.content:
            told = f"the answers of id {verdict.id!r} are not those of {item.origin}: give another --out"
            raise BadRow("bad_ranking", told)
        self._keys[key] = verdict
        self._revisions[verdict.annotator, verdict.id] = verdict.revision
        self._latest[verdict.id][verdict.annotator] = verdict


def _line(item: Item, verdict: Verdict, key: str) -> bytes:
    row = item.ranked(verdict.ranks)
    row.update(
        annotator=verdict.annotator,
        id=verdict.id,
        order=list(verdict.order),
        seconds=verdict.seconds,
        flag=verdict.flag,
        status=verdict.status,
        revision=verdict.revision,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        key=key,
    )
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
