"""What prepared rows hold, as one hash and a digest a row: by it a cache of a teacher knows its data again.

Kept beside the rows, since making it reads them all once::

    KEY/contents-1/rows.safetensors   offsets int64 [N + 1], digests uint64 [N]
    KEY/contents-1/hash.txt           32 hexadecimal digits
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ptl.data.claim import Claim, made_once
from ptl.data.loader import table_rows
from ptl.data.mapped import mapped
from ptl.data.prepare import Prepared

_VERSION = 1
"""Part of the folder's name; raised when the same rows get another hash."""
_READ = 1024
"""Rows read at a time."""


@dataclass(frozen=True)
class Contents:
    """The index of N prepared rows; memory-mapped.

    Attributes:
        hash: hex digest over ids and trained positions of all rows, in order; nothing else of the data changes it.
        offsets: int64 [N + 1], trained tokens before each row; the last is their number.
        digests: uint64 [N], see ``row_digest``.
    """

    hash: str
    offsets: np.ndarray
    digests: np.ndarray


def contents(prepared: Prepared) -> Contents:
    """The index of prepared conversations, from beside them or made now by one of the processes that ask.

    Raises:
        ValueError: the rows are no documents of tokens (a view other than ``ChatView``).
    """
    if missing := {"ids", "spans", "span_weights"} - set(prepared.rows.column_names):
        raise ValueError(f"the prepared rows have no column {sorted(missing)[0]}: a teacher reads chat or text data")
    target = Path(prepared.path) / f"contents-{_VERSION}"
    made_once(target, lambda folder, claim: _make(prepared, folder, claim))
    tensors, _ = mapped(target / "rows.safetensors")
    return Contents((target / "hash.txt").read_text().strip(), tensors["offsets"], tensors["digests"])


def _make(prepared: Prepared, folder: Path, claim: Claim) -> None:
    count = len(prepared.rows)
    offsets, digests = np.zeros(count + 1, np.int64), np.zeros(count, np.uint64)
    whole = hashlib.blake2b(digest_size=16)
    for number, row in enumerate(examples(prepared, 0, count)):
        positions = trained_positions(row["spans"])
        digest = _digest(row["ids"], positions)
        whole.update(digest)
        digests[number] = np.frombuffer(digest, np.uint64, 1)[0]
        offsets[number + 1] = len(positions)
        if number % _READ == 0:
            claim.progress = f"{number:,} of {count:,} rows indexed"
    np.cumsum(offsets, out=offsets)
    save_file({"offsets": offsets, "digests": digests}, folder / "rows.safetensors")
    (folder / "hash.txt").write_text(whole.hexdigest())


def examples(prepared: Prepared, begin: int, end: int) -> Iterator[dict[str, Any]]:
    """The rows from ``begin`` to ``end`` as ``collate_tokens`` takes them, each with its index ``row``."""
    columns = ["ids", "spans", "span_weights", "source", "length"]
    rows = prepared.rows.select_columns(columns).with_format("arrow")
    for start in range(begin, end, _READ):
        table: Any = rows[start : min(start + _READ, end)]
        for number, row in enumerate(table_rows(table), start):
            yield {**row, "row": number}


def trained_positions(spans: np.ndarray) -> np.ndarray:
    """Positions, int32, of the trained tokens of a document, from its runs of equal weight; never the first token."""
    bounds = np.asarray(spans, np.int32).reshape(-1, 2)
    parts = [np.arange(max(1, begin), end, dtype=np.int32) for begin, end in bounds.tolist()]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def row_digest(ids: np.ndarray, positions: np.ndarray) -> int:
    """8 bytes that tell whether a document is the one that was indexed, as an unsigned number.

    Args:
        ids: [T] token ids.
        positions: of its trained tokens.
    """
    return int(np.frombuffer(_digest(ids, positions), np.uint64, 1)[0])


def _digest(ids: np.ndarray, positions: np.ndarray) -> bytes:
    """16 bytes over the ids, their number and the trained positions, all as little-endian int32."""
    digest = hashlib.blake2b(np.int64(len(ids)).astype("<i8").tobytes(), digest_size=16)
    digest.update(np.asarray(ids, "<i4").tobytes())
    digest.update(np.asarray(positions, "<i4").tobytes())
    return digest.digest()
