"""The files behind a source: finding them, opening them, telling what they are and whether they changed."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ptl.data.gym import SCHEME, GymData, gym_data
from ptl.data.sources import Source

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet"]
SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
SMALL = 16 << 20
"""Files up to this many bytes are hashed whole; of larger ones the size, mtime and samples are."""
SAMPLES, SAMPLE = 16, 64 << 10
HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


class UnreadableFile(ValueError):  # noqa: N818  (named for what the user has to mend)
    """A file that cannot be read to its end, so that its rows cannot even be counted."""

    def __init__(self, shown: str, detail: str) -> None:
        super().__init__(f"{shown}: {detail}")


@dataclass(frozen=True)
class DataFile:
    """One file of rows.

    Attributes:
        path: the file on disk; of a zip member, the archive.
        shown: the file as the user knows it.
        kind: what its text is.
        inner: member of the archive ``path``.
        compressed: gzip around the text.
    """

    path: str
    shown: str
    kind: Kind
    inner: str | None = None
    compressed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether byte offsets of the text are offsets of the file on disk."""
        return self.inner is None and not self.compressed

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the text; of a gzip file an estimate (4 times its size)."""
        size = self._member.file_size if self.inner else Path(self.path).stat().st_size
        return size * 4 if self.compressed else size

    @property
    def _member(self) -> zipfile.ZipInfo:
        with zipfile.ZipFile(self.path) as archive:
            return archive.getinfo(cast(str, self.inner))

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The text as a byte stream."""
        with ExitStack() as stack:
            if self.inner is None:
                stream = stack.enter_context(open(self.path, "rb", buffering=1 << 20))
            else:
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                stream = stack.enter_context(archive.open(self.inner))
            if self.compressed:
                stream = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=stream)))
            yield stream

    @cached_property
    def _parquet(self) -> pq.ParquetFile:
        if self.is_plain:
            return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        with self.open() as stream:
            return pq.ParquetFile(io.BytesIO(stream.read()))

    def num_rows(self) -> int:
        """Rows of a Parquet file."""
        return self._parquet.metadata.num_rows

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of a Parquet file, at most ``rows`` at a time."""
        yield from self._parquet.iter_batches(batch_size=rows)

    def identity(self) -> list[Any]:
        """What changes when the content does, cheap for any size: see ``file_identity``; of a zip member its CRC."""
        if self.inner is not None:
            return [self.shown, self.kind, self._member.CRC, self._member.file_size]
        return [self.shown, self.kind, *file_identity(Path(self.path))]


@dataclass(frozen=True)
class HubData:
    """A hub data set, memory-mapped from the cache of ``datasets``."""

    shown: str
    dataset: Dataset

    @property
    def nbytes(self) -> int:
        return self.dataset.data.nbytes

    def num_rows(self) -> int:
        return self.dataset.num_rows

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        for table in self.dataset.with_format("arrow").iter(batch_size=rows):
            yield from cast(pa.Table, table).combine_chunks().to_batches()

    def identity(self) -> list[Any]:
        files = [file_identity(Path(entry["filename"])) for entry in self.dataset.cache_files]
        return [self.shown, self.dataset.num_rows, self.dataset.column_names, files]


AnyFile = DataFile | HubData | GymData
"""Where rows are."""

Files = Sequence[AnyFile]
"""The files of one source, in the order in which they are read."""


def file_identity(path: Path) -> list[Any]:
    """Size and content digest of a file.

    Up to ``SMALL`` bytes the sha256 of all of it. Beyond, so that a second start does not read the data again: size,
    mtime, and the sha256 of the head, the tail and evenly spaced samples. A change that keeps the size, the mtime and
    all the samples goes unseen.
    """
    stat = path.stat()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if stat.st_size <= SMALL:
            digest.update(file.read())
            return [stat.st_size, digest.hexdigest()]
        for i in range(SAMPLES + 1):
            file.seek((stat.st_size - SAMPLE) * i // SAMPLES)
            digest.update(file.read(SAMPLE))
    return [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]


def resolve(source: Source) -> list[AnyFile]:
    """The files of a source, in the order in which they are read.

    Raises:
        ValueError: the path leads nowhere, or to nothing that can be read.
    """
    path = source.path
    local = Path(path).expanduser()
    if path.startswith("zip://"):
        files: list[AnyFile] = [_in_zip(path)]
    elif path.startswith(SCHEME):
        files = [gym_data(path)]
    elif "://" in path:
        raise ValueError(f"source {path}: only zip://inner::outer.zip and gym://NAME are read among URLs; download it")
    elif local.is_dir():
        files = list(_in_folder(local, path))
    elif local.is_file():
        files = [_local(local, path)]
    elif any(char in path for char in "*?["):
        files = [_local(Path(name), name) for name in sorted(glob.glob(str(local), recursive=True))]
        if not files:
            raise ValueError(f"source {path}: no file matches")
    elif not HUB_NAME.match(path) or _suffixes(local)[0] in SUFFIXES:
        raise ValueError(f"source {path}: no such file or folder (working directory {Path.cwd()})")
    else:
        return [_from_hub(source)]
    if source.split != "train":
        raise ValueError(f"source {path}: split is {source.split!r}, but only hub data sets have splits; name the file")
    return files


def _suffixes(path: Path) -> tuple[str, bool]:
    """The suffix that tells the kind, and whether ``.gz`` follows it."""
    if path.suffix.lower() == ".gz":
        return path.with_suffix("").suffix.lower(), True
    return path.suffix.lower(), False


def _local(path: Path, shown: str, inner: str | None = None) -> DataFile:
    suffix, compressed = _suffixes(Path(inner) if inner else path)
    if suffix not in SUFFIXES:
        raise ValueError(
            f"source {shown}: the suffix is {suffix!r}; expected one of {list(SUFFIXES)}, or one of them with .gz"
        )
    file = DataFile(str(path), shown, SUFFIXES[suffix], inner, compressed)
    if file.kind != "json":
        return file
    with file.open() as stream:
        try:
            head = stream.read(4096).decode("utf-8-sig", errors="replace").lstrip()
        except (EOFError, OSError) as error:
            raise UnreadableFile(shown, f"it cannot be read ({error})") from None
    return DataFile(str(path), shown, "json" if head.startswith("[") else "jsonl", inner, compressed)


def _in_folder(folder: Path, shown: str) -> Iterator[DataFile]:
    inside = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    wanted = [
        path
        for path in sorted(inside, key=lambda path: path.as_posix())
        if _suffixes(path)[0] in SUFFIXES and not any(part.startswith((".", "_")) for part in path.parts)
    ]
    if not wanted:
        raise ValueError(f"source {shown}: the folder has no data file; expected files ending in {list(SUFFIXES)}")
    for path in wanted:
        yield _local(folder / path, (Path(shown) / path).as_posix())


def _in_zip(path: str) -> DataFile:
    inner, separator, outer = path.removeprefix("zip://").partition("::")
    archive = Path(outer).expanduser()
    if not separator or not archive.is_file():
        raise ValueError(f"source {path}: no archive at {outer!r}; expected zip://inner/path::outer.zip")
    if not zipfile.is_zipfile(archive):
        raise UnreadableFile(path, f"{outer} is not a zip archive")
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
    if inner not in names:
        tail = inner.rsplit("/", 1)[-1]
        near = [name for name in names if name.endswith(tail)] or [
            name for name in names if _suffixes(Path(name))[0] in SUFFIXES
        ]
        raise ValueError(f"source {path}: the archive has no {inner!r}; it has {near[:5]}")
    return _local(archive, path, inner)


def _from_hub(source: Source) -> HubData:
    from datasets import Dataset, load_dataset

    name, _, config = source.path.partition(":")
    try:
        dataset = load_dataset(name, config or None, split=source.split)
    except Exception as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"source {source.path}: no such file or folder, and as a hub name it failed (split {source.split!r}): "
            f"{told}"
        ) from error
    if not isinstance(dataset, Dataset):
        raise ValueError(f"source {source.path}: split {source.split!r} is not one data set; name one split")
    return HubData(f"{source.path}[{source.split}]", dataset)
