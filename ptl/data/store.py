"""Prepared rows on disk: Arrow shards, memory-mapped columns, a manifest.

KEY/rows-00000.arrow ...   the documents, Arrow IPC streams as ``datasets`` writes them
KEY/lengths.npy            int32 [N]     tokens of a document
KEY/weights.npy            float32 [N]   sum of its loss weights
KEY/source_ids.npy         int16 [N]     its source
KEY/audit.json             the audit
KEY/manifest.json          what it was made from, and the size of every file
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

SHARD = 1 << 30
"""Bytes after which a new shard starts."""
BATCH = 8192
"""Documents of an Arrow record batch."""
COLUMNS = {
    "lengths": ("length", np.dtype(np.int32)),
    "weights": ("weight", np.dtype(np.float32)),
    "source_ids": ("source", np.dtype(np.int16)),
}
MANIFEST, AUDIT = "manifest.json", "audit.json"


class _Column:
    """A growing .npy file of one dimension."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.file: IO[bytes] = path.open("wb")
        self.dtype, self.count = dtype, 0
        self._header()

    def _header(self) -> None:
        """numpy pads a header so that its size does not depend on the length of the array."""
        self.file.seek(0)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.start = self.file.tell()

    def add(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.count += len(values)

    def close(self) -> None:
        start = self.start
        self._header()
        if self.start != start:
            raise RuntimeError(f"the header of {self.file.name} grew from {start} to {self.start} bytes")
        self.file.close()


class Writer:
    """Writes documents to a folder, in the order in which they are added.

    Arguments:
        folder: an empty folder.
        schema: Arrow schema of the documents.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder, self.schema = folder, schema
        self.columns = {name: _Column(folder / f"{name}.npy", dtype) for name, (_, dtype) in COLUMNS.items()}
        self.shards = 0
        self._waiting: list[pa.RecordBatch] = []
        self._stream: pa.RecordBatchStreamWriter | None = None
        self._file: pa.NativeFile | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds documents."""
        if not batch.num_rows:
            return
        for name, (column, _) in COLUMNS.items():
            self.columns[name].add(batch.column(column).to_numpy())
        self._waiting.append(batch)
        if sum(waiting.num_rows for waiting in self._waiting) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._stream is None:
            self._file = pa.OSFile(str(self.folder / f"rows-{self.shards:05d}.arrow"), "wb")
            self._stream = pa.ipc.new_stream(self._file, self.schema)
            self.shards += 1
        self._stream.write_table(pa.Table.from_batches(self._waiting, self.schema).combine_chunks())
        self._waiting.clear()
        if cast(pa.NativeFile, self._file).tell() >= SHARD:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._stream is not None and self._file is not None:
            self._stream.close()
            self._file.close()
        self._stream = self._file = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self._flush()
        self._end_shard()
        for column in self.columns.values():
            column.close()


def seal(folder: Path, manifest: Mapping[str, Any], audit: Mapping[str, Any]) -> None:
    """Writes the audit and, last, the manifest with the size of every file."""
    (folder / AUDIT).write_text(json.dumps(audit, indent=1), encoding="utf-8")
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1), encoding="utf-8")


def unseal(folder: Path) -> tuple[Dataset, dict[str, np.ndarray], dict[str, Any]]:
    """The documents, their columns and the audit, all memory-mapped but the audit.

    Raises:
        ValueError: a file is missing or has another size than the manifest says.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
        audit = json.loads((folder / AUDIT).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"the prepared data in {folder} is damaged ({error}); delete the folder") from error
    if wrong := sorted(name for name, size in sizes.items() if size != manifest["files"][name]):
        raise ValueError(f"the prepared data in {folder} is damaged ({wrong} changed size); delete the folder")
    shards = [Dataset.from_file(str(folder / name)) for name in sorted(sizes) if name.endswith(".arrow")]
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    return shards[0] if len(shards) == 1 else concatenate_datasets(shards), columns, audit
