"""The work of one process: a block of rows becomes an Arrow batch of documents and what to say about the rest.

An ``Encoder`` is a pure function of a block, so blocks may be encoded by any process and in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ptl.data.audit import EXAMPLES, FULLY_MASKED, Reason
from ptl.data.duplicates import DIGEST
from ptl.data.readers import Block
from ptl.data.records import parse_row
from ptl.data.render import Renderer, RenderError, TooLong, Truncation
from ptl.data.sources import BadRow, LeftOut, Source
from ptl.data.views import Example, View
from ptl.types import Origin


@dataclass(frozen=True)
class Job:
    """A block and the source it belongs to."""

    source: int
    block: Block


@dataclass
class Encoded:
    """What a block became.

    Attributes:
        source: index of the source.
        rows: rows of the block, good or bad.
        nbytes: bytes of the file it covers.
        batch: the documents, with the view's columns, ``source`` and ``line``.
        owner: int32 [D], which kept row a document is of.
        digests: ``DIGEST`` [K] of the kept rows.
        trained: int64 [D], trained tokens of the documents.
        bos: int64 [D], BOS tokens that the documents start with; None where the tokenizer has no BOS.
        file: the file, as shown.
        lines: int64 [K], lines of the kept rows.
        truncated_rows: rows with a cut document.
        masked_documents: documents left out because nothing in them is trained.
        refused, dropped: reason -> rows.
    """

    source: int
    rows: int
    nbytes: int
    batch: pa.RecordBatch
    owner: np.ndarray
    digests: np.ndarray
    trained: np.ndarray
    bos: np.ndarray | None
    file: str
    lines: np.ndarray
    truncated_rows: int = 0
    masked_documents: int = 0
    refused: dict[str, Reason] = field(default_factory=dict)
    dropped: dict[str, Reason] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """Turns blocks into documents; picklable.

    Attributes:
        sources: the sources, by index.
        formats: the format of each source's rows.
        view, renderer, max_length, truncation: see ``prepare``.
    """

    sources: Sequence[Source]
    formats: Sequence[str]
    view: View
    renderer: Renderer
    max_length: int
    truncation: Truncation

    def __call__(self, job: Job) -> Encoded:
        """The block's documents, in order of its rows.

        Raises:
            ValueError: a row is longer than ``max_length`` and the truncation policy is ``error``.
        """
        records, lines, refused, dropped = self._records(job)
        documents: list[Example] = []
        owner: list[int] = []
        digests: list[bytes] = []
        kept: list[int] = []
        truncated_rows = masked = 0
        for line, made in zip(lines, self.view.encode(records, self.renderer, self.max_length, self.truncation)):
            if isinstance(made, RenderError):
                self._refuse(made, Origin(job.block.file, line), refused, dropped)
                continue
            truncated_rows += any(example["truncated"] for example in made)
            trained = [example for example in made if example["weight"] > 0]
            masked += len(made) - len(trained)
            if not trained:
                note(dropped, FULLY_MASKED, Origin(job.block.file, line), "no token of the row is trained")
                continue
            owner += [len(kept)] * len(trained)
            digests.append(digest_of(trained))
            documents += trained
            kept.append(line)
        row_lines = np.asarray(kept, np.int64)
        owners = np.asarray(owner, np.int32)
        bos: Any = self.renderer.tokenizer.bos_token_id
        return Encoded(
            source=job.source,
            rows=job.block.count,
            nbytes=job.block.nbytes,
            batch=self._batch(documents, job.source, row_lines[owners]),
            owner=owners,
            digests=np.asarray(digests, DIGEST),
            trained=np.asarray([trained_tokens(example) for example in documents], np.int64),
            bos=None if bos is None else np.asarray([bos_tokens(example, bos) for example in documents], np.int64),
            lines=row_lines,
            file=job.block.file,
            truncated_rows=truncated_rows,
            masked_documents=masked,
            refused=refused,
            dropped=dropped,
        )

    def _records(self, job: Job) -> tuple[list[Any], list[int], dict[str, Reason], dict[str, Reason]]:
        """The records of a block and their lines; the rows refused, and those left out by what they say."""
        source, row_format = self.sources[job.source], self.formats[job.source]
        records, lines, refused, dropped = [], [], {}, {}
        for line, row in job.block.rows():
            origin = Origin(job.block.file, line)
            try:
                records.append(parse_row(row, row_format, source, origin))
                lines.append(line)
            except BadRow as bad:
                note(dropped if isinstance(bad, LeftOut) else refused, bad.reason, origin, bad.detail)
        return records, lines, refused, dropped

    def _refuse(self, error: RenderError, origin: Origin, refused: dict, dropped: dict) -> None:
        if error.reason == "nothing_trained":
            note(dropped, FULLY_MASKED, origin, error.detail)
        elif not isinstance(error, TooLong):
            note(refused, error.reason, origin, error.detail)
        elif self.truncation == "error":
            raise ValueError(f"{origin}: {error.detail} (data.truncation is error)")
        else:
            note(dropped, error.reason, origin, error.detail)

    def _batch(self, documents: list[Example], source: int, lines: np.ndarray) -> pa.RecordBatch:
        schema = schema_of(self.view)
        arrays = [column([doc[name] for doc in documents], schema.field(name).type) for name in self.view.features]
        arrays += [pa.array(np.full(len(documents), source, np.int16)), pa.array(lines)]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


def schema_of(view: View) -> pa.Schema:
    """The view's columns, ``source`` and ``line``, with the metadata by which ``datasets`` reads them."""
    from datasets import Features, Value

    return Features({**view.features, "source": Value("int16"), "line": Value("int64")}).arrow_schema


def column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow column; lists of numbers go through one concatenated array."""
    if values and pa.types.is_list(kind) and all(isinstance(value, np.ndarray) for value in values):
        offsets = np.zeros(len(values) + 1, np.int32)
        np.cumsum([len(value) for value in values], out=offsets[1:])
        flat = pa.array(np.concatenate(values), kind.value_type)
        return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)
    return pa.array(values, kind)


def digest_of(documents: Sequence[Example]) -> bytes:
    """16 bytes that are equal for rows whose documents are equal in every column.

    Left out are the record that a prompt's judge needs, which names the row's own line, and the prompt's pass rate.
    Equal questions are equal rows.
    """
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        for name, value in document.items():
            if name in ("prompt", "pass_rate"):
                continue
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
            digest.update(b"\0")
    return digest.digest()


def trained_tokens(example: Example) -> int:
    """Tokens with a loss weight; of a view without spans its weight."""
    if "spans" not in example:
        return int(example["weight"])
    spans = np.asarray(example["spans"], np.int64)
    return int((spans[1::2] - spans[0::2]).sum())


def bos_tokens(example: Example, bos: int) -> int:
    """BOS tokens that a document starts with; of a view without one token list it is taken as 1.

    Later ones are not counted: some tokenizers (SmolLM2) have the token that opens every turn as their BOS.
    """
    if "ids" not in example:
        return 1
    others = np.flatnonzero(np.asarray(example["ids"]) != bos)
    return int(others[0]) if len(others) else len(example["ids"])


def note(reasons: dict[str, Reason], reason: str, origin: Origin, detail: str) -> None:
    """Counts a row under its reason, and keeps the first as examples."""
    entry = reasons.setdefault(reason, Reason())
    entry.add(1, [f"{origin}: {reason}: {detail}"] if len(entry.examples) < EXAMPLES else [])
