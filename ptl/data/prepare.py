"""Rows of many sources as tokens on disk: made once by one process of a file system, then memory-mapped by all.

The rows of the result are in the order of the sources and of their lines, whatever the number of processes. No process
holds more than a few blocks of rows; what grows with the data is 16 bytes a row for finding duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ptl.data.audit import DUPLICATE, EXAMPLES, Audit, AuditError, Reason, SourceAudit, Thresholds, length_summary
from ptl.data.cache_key import cache_inputs, cache_key
from ptl.data.claim import PATIENCE, Claim, made_once
from ptl.data.duplicates import Seen
from ptl.data.encode import Encoded, Encoder, Job, schema_of
from ptl.data.files import Files, resolve
from ptl.data.readers import Beyond, blocks, first_rows
from ptl.data.render import Renderer, Truncation
from ptl.data.report import Report, say
from ptl.data.sources import Source, check_record, detect_format
from ptl.data.store import Writer, seal, unseal
from ptl.data.views import View
from ptl.data.workers import in_order, processes

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Prepared:
    """Tokenised rows; nothing of them is in memory until it is read.

    Attributes:
        path: the folder, named by its key.
        rows: the documents with the view's columns, ``source`` int16 and ``line`` int64 (1-based, within its file).
        lengths: tokens of each document, int32 [N].
        weights: loss weight of each document, float32 [N].
        source_ids: index into ``sources`` of each document, int16 [N].
        sources: labels of the sources.
        audit: counts of each source.
    """

    path: Path
    rows: Dataset
    lengths: np.ndarray
    weights: np.ndarray
    source_ids: np.ndarray
    sources: tuple[str, ...]
    audit: Audit


def prepare(
    sources: Sequence[Source],
    *,
    view: View,
    renderer: Renderer,
    max_length: int,
    truncation: Truncation,
    max_bad_fraction: float = 0.0,
    deduplicate: bool = False,
    cache_dir: str | Path,
    num_proc: int | None = None,
    patience: float = PATIENCE,
    quiet: bool = False,
) -> Prepared:
    """The sources as tokens, from the cache or made now. Any number of processes may call it at the same time.

    Args:
        sources: at least one, at most 32,767.
        view: which record is read, and what is stored of it.
        renderer: turns messages into tokens.
        max_length: most tokens of a document.
        truncation: what to do with a longer one.
        max_bad_fraction: share of a source's rows that may be refused. With 0 the first refused rows stop the reading.
        deduplicate: drop rows that are equal to an earlier one, of any source, after rendering.
        cache_dir: where prepared data is kept, one folder a key.
        num_proc: processes that tokenise; None takes the cores that this process may use, at most 16.
        patience: seconds after which a silent process that prepares the same data is taken for dead.
        quiet: shows no progress.

    Raises:
        AuditError: a source has more refused rows than ``max_bad_fraction`` allows, or nothing to train.
        ValueError: a path, a format or an option is wrong, a file cannot be read, or a row is too long for
            ``truncation="error"``.
    """
    if not 0 < len(sources) < 2**15:
        raise ValueError(f"{len(sources)} sources; expected at least one and at most 32,767")
    limits = Thresholds(max_bad_fraction=max_bad_fraction, max_fully_masked=1.0, min_trained_tokens=0)
    workers = processes(num_proc)
    files = [resolve(source) for source in sources]
    how: dict[str, Any] = {"view": view, "renderer": renderer, "max_length": max_length, "truncation": truncation}
    inputs = cache_inputs(sources, files, deduplicate=deduplicate, **how)
    target = Path(cache_dir).expanduser() / cache_key(inputs)

    def make(folder: Path, claim: Claim) -> None:
        stop = limits if max_bad_fraction == 0 else None
        count = Count(encoder_of(sources, files, **how), files, deduplicate=deduplicate, limits=stop)
        with Writer(folder, schema_of(view)) as writer, Report(_bytes_of(files), quiet=quiet) as report:
            for batch in count.run(workers, report):
                writer.add(batch)
                claim.progress = report.text
        audit = count.audit()
        if not any(source.documents for source in audit.sources):
            audit.check(replace(limits, min_trained_tokens=1))
        seal(folder, {"inputs": inputs}, audit.as_dict())

    made_once(target, make, patience=patience, say=(lambda text: None) if quiet else say)
    prepared = open_prepared(target, sources)
    prepared.audit.check(limits)
    return prepared


def open_prepared(folder: Path, sources: Sequence[Source]) -> Prepared:
    """Prepared data from its folder, under the present names of its sources.

    Raises:
        ValueError: the folder is damaged.
    """
    rows, columns, facts = unseal(folder)
    audit = Audit.from_dict(facts)
    for entry, source in zip(audit.sources, sources):
        entry.name, entry.path = source.label, source.path
    return Prepared(folder, rows, **columns, sources=tuple(source.label for source in sources), audit=audit)


def audit_sources(
    sources: Sequence[Source],
    *,
    view: View,
    renderer: Renderer,
    max_length: int,
    truncation: Truncation,
    num_proc: int | None = None,
    quiet: bool = False,
) -> Audit:
    """The audit that ``prepare`` would make, with every refused row counted, without keeping any token.

    Arguments and errors as for ``prepare``.
    """
    files = [resolve(source) for source in sources]
    encoder = encoder_of(sources, files, view=view, renderer=renderer, max_length=max_length, truncation=truncation)
    count = Count(encoder, files, deduplicate=False, limits=None)
    with Report(_bytes_of(files), quiet=quiet) as report:
        for _ in count.run(processes(num_proc), report):
            pass
    return count.audit()


def encoder_of(
    sources: Sequence[Source],
    files: Sequence[Files],
    *,
    view: View,
    renderer: Renderer,
    max_length: int,
    truncation: Truncation,
) -> Encoder:
    """The encoder, once every source's format is known and fits the view."""
    formats = []
    for source, own in zip(sources, files):
        formats.append(detect_format(source, () if source.format != "auto" else first_rows(source, files=own)))
        check_record(source, formats[-1], view.record)
    return Encoder(tuple(sources), tuple(formats), view, renderer, max_length, truncation)


def _bytes_of(files: Sequence[Files]) -> int:
    return sum(file.nbytes for own in files for file in own)


def _total(batch: pa.RecordBatch, name: str) -> int:
    return int(batch.column(name).to_numpy(zero_copy_only=False).sum(dtype=np.int64))


class Count:
    """Runs an encoder over its sources and counts what became of every row.

    Arguments:
        encoder: with its sources.
        files: of each source.
        deduplicate: leave out rows that were seen before.
        limits: stop as soon as a source has refused rows; None counts to the end.
    """

    def __init__(
        self, encoder: Encoder, files: Sequence[Files], *, deduplicate: bool, limits: Thresholds | None
    ) -> None:
        self.encoder, self.files, self.deduplicate, self.limits = encoder, files, deduplicate, limits
        self.sources = [
            SourceAudit(source.label, source.path, row_format)
            for source, row_format in zip(encoder.sources, encoder.formats)
        ]
        self.beyond = [Beyond() for _ in self.sources]
        self.histograms = [np.zeros(0, np.int64) for _ in self.sources]
        self.seen = Seen()

    def run(self, num_proc: int, report: Report) -> Iterator[pa.RecordBatch]:
        """The documents, in order."""
        jobs = (
            Job(index, block)
            for index, source in enumerate(self.encoder.sources)
            for block in blocks(source, self.beyond[index], self.files[index])
        )
        for encoded in in_order(self.encoder, jobs, num_proc):
            batch = self._take(encoded)
            report.add(rows=encoded.rows, nbytes=encoded.nbytes, tokens=_total(batch, "length"))
            yield batch

    def _take(self, encoded: Encoded) -> pa.RecordBatch:
        """Counts a block and gives the documents that are kept."""
        entry = self.sources[encoded.source]
        repeated = self.seen.add(encoded.digests) if len(encoded.digests) else np.zeros(0, bool)
        kept = ~repeated if self.deduplicate else np.ones(len(repeated), bool)
        entry.rows += encoded.rows
        entry.kept += int(kept.sum())
        entry.duplicates += int(repeated.sum())
        entry.truncated_rows += encoded.truncated_rows
        entry.masked_documents += encoded.masked_documents
        for mine, theirs in ((entry.refused, encoded.refused), (entry.dropped, encoded.dropped)):
            for name, reason in theirs.items():
                mine.setdefault(name, Reason()).add(reason.count, reason.examples)
        if not kept.all():
            lines = encoded.lines[~kept]
            told = [f"{encoded.file}:{line}: {DUPLICATE}: equal to an earlier row" for line in lines[:EXAMPLES]]
            entry.dropped.setdefault(DUPLICATE, Reason()).add(len(lines), told)
        documents = kept[encoded.owner]
        batch = encoded.batch if kept.all() else encoded.batch.filter(pa.array(documents))
        self._count_documents(entry, encoded, documents, batch)
        if self.limits is not None and encoded.refused:
            try:
                entry.check(self.limits)
            except AuditError as error:
                raise AuditError(f"{error}\nReading stopped there; `ptl data audit` counts them all.") from None
        return batch

    def _count_documents(self, entry: SourceAudit, encoded: Encoded, kept: np.ndarray, batch: pa.RecordBatch) -> None:
        lengths = batch.column("length").to_numpy()
        entry.documents += len(lengths)
        entry.tokens += int(lengths.sum(dtype=np.int64))
        entry.trained_tokens += int(encoded.trained[kept].sum())
        entry.truncated += _total(batch, "truncated")
        entry.lost_end += _total(batch, "lost_end")
        if encoded.bos is not None:
            counts = np.bincount(np.minimum(encoded.bos[kept], 2), minlength=3)
            entry.bos = [int(a + b) for a, b in zip(entry.bos or [0, 0, 0], counts)]
        old = self.histograms[encoded.source]
        new = np.bincount(lengths, minlength=len(old))
        new[: len(old)] += old
        self.histograms[encoded.source] = new

    def audit(self) -> Audit:
        """The audit, after ``run`` came to its end."""
        for entry, beyond, histogram in zip(self.sources, self.beyond, self.histograms):
            entry.beyond_limit, entry.beyond_limit_estimated = beyond.rows, beyond.estimated
            entry.lengths = length_summary(histogram)
        return Audit(self.sources)
