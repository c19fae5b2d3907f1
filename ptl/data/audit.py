"""What the data would train: counts for every source, and the thresholds that stop a run before its first step.

Law 8 is an equation here: for every source, ``rows == kept + refused + dropped``, where each refusal and each drop has
a reason, a number and first examples by file and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = 5
"""First rows kept for each reason."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)

TOO_LONG = ("too_long", "nothing_left")
"""Rows longer than max_length that were dropped, or of which the cut left nothing to train."""
LEFT_OUT = ("not_ranked", "superseded", "pass_rate")
"""Rows that are left out for what they say themselves, before they are rendered."""
DUPLICATE = "duplicate"
FULLY_MASKED = "fully_masked"


class AuditError(ValueError):
    """The data does not meet a threshold. The message names the source, the first rows and the key to change."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Limits on each source; shares are of 0 to 1.

    Attributes:
        max_bad_fraction: refused rows over rows.
        max_fully_masked: rows without a trained token over rows that were rendered.
        max_truncated: rows that were cut, or dropped because they are too long, over rows that were rendered.
        min_trained_tokens: trained tokens of a source.
    """

    max_bad_fraction: float = 0.0
    max_fully_masked: float = 0.1
    max_truncated: float = 1.0
    min_trained_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("max_bad_fraction", "max_fully_masked", "max_truncated"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected a share from 0 to 1")


@dataclass
class Reason:
    """How many rows share a reason, and the first of them as ``file:line: detail``."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: Sequence[str]) -> None:
        self.count += count
        self.examples += examples[: max(0, EXAMPLES - len(self.examples))]


@dataclass
class SourceAudit:
    """Counts of one source.

    Attributes:
        name, path, format: as the source says, with the format that was found.
        rows: rows read, good or bad, blank lines not counted.
        kept: rows with at least one document in the prepared data.
        refused: reason -> rows that could not be read or rendered.
        dropped: reason -> rows left out by choice: ``too_long``, ``nothing_left`` (of the cut), ``duplicate``,
            ``fully_masked``, ``not_ranked`` and ``superseded`` (rankings that nobody is to learn from), ``pass_rate``.
        beyond_limit: rows after ``Source.limit``, not among ``rows``; an estimate in huge text files, see
            ``beyond_limit_estimated``.
        documents: documents in the prepared data; a row may make several.
        masked_documents: documents without a trained token, left out.
        tokens, trained_tokens: of the documents kept; a token is trained when its loss weight is not 0.
        truncated: documents of which tokens or turns were cut to fit.
        truncated_rows: rows, kept or not, with such a document.
        lost_end: documents of which a trained answer lost its end-of-turn to the cut.
        bos: documents that start with 0, 1, and 2 or more BOS tokens; None where the tokenizer has no BOS.
        duplicates: rows equal to an earlier row of any source after rendering, dropped or not.
        lengths: ``{"mean": tokens, "p5": tokens, ...}`` of the documents, filled at the end.
    """

    name: str
    path: str
    format: str
    rows: int = 0
    kept: int = 0
    refused: dict[str, Reason] = field(default_factory=dict)
    dropped: dict[str, Reason] = field(default_factory=dict)
    beyond_limit: int = 0
    beyond_limit_estimated: bool = False
    documents: int = 0
    masked_documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    truncated_rows: int = 0
    lost_end: int = 0
    bos: list[int] | None = None
    duplicates: int = 0
    lengths: dict[str, float] = field(default_factory=dict)

    @property
    def refused_rows(self) -> int:
        return sum(reason.count for reason in self.refused.values())

    @property
    def dropped_rows(self) -> int:
        return sum(reason.count for reason in self.dropped.values())

    @property
    def rendered_rows(self) -> int:
        """Rows that became tokens, or were too long to."""
        return self.rows - self.refused_rows - sum(self.dropped_by(reason) for reason in LEFT_OUT)

    def dropped_by(self, reason: str) -> int:
        return self.dropped[reason].count if reason in self.dropped else 0

    def check(self, limits: Thresholds) -> None:
        """Raises ``AuditError`` on the first threshold that is not met."""
        if not self.rows:
            raise AuditError(f"source {self.name}: it has no rows")
        if self.refused_rows > limits.max_bad_fraction * self.rows:
            raise AuditError(
                f"source {self.name}: {self.refused_rows:,} of {self.rows:,} rows cannot be used, more than "
                f"data.thresholds.max_bad_fraction = {limits.max_bad_fraction:g} allows. First of them:\n"
                + "\n".join(f"  {line}" for line in first_examples(self.refused))
                + "\nMend the rows, or set data.thresholds.max_bad_fraction to at least "
                + f"{self._share(self.refused_rows)}."
            )
        rendered = max(1, self.rendered_rows)
        cut = self.truncated_rows + sum(self.dropped_by(reason) for reason in TOO_LONG)
        for key, got, what in (
            ("max_fully_masked", self.dropped_by(FULLY_MASKED), "have no trained token (see train and train_roles)"),
            ("max_truncated", cut, "are longer than max_length"),
        ):
            if got > getattr(limits, key) * rendered:
                raise AuditError(
                    f"source {self.name}: {got:,} of {rendered:,} rendered rows {what}, more than "
                    f"data.thresholds.{key} = {getattr(limits, key):g} allows"
                )
        if self.trained_tokens < limits.min_trained_tokens:
            raise AuditError(
                f"source {self.name}: {self.trained_tokens:,} trained tokens, fewer than "
                f"data.thresholds.min_trained_tokens = {limits.min_trained_tokens:,}; of {self.rows:,} rows "
                f"{self.refused_rows:,} were refused and "
                f"{self.dropped_rows:,} dropped ({', '.join(self.dropped) or '-'})"
            )

    def _share(self, count: int) -> str:
        return f"{np.ceil(1e4 * count / self.rows) / 1e4:g}"


@dataclass
class Audit:
    """The audit of a data set: one ``SourceAudit`` a source, in order."""

    sources: list[SourceAudit]

    def check(self, thresholds: Thresholds) -> None:
        """Stops a run on data that would not train as meant.

        Raises:
            AuditError: a source does not meet a threshold.
        """
        for source in self.sources:
            source.check(thresholds)

    def as_dict(self) -> dict[str, Any]:
        """JSON form; ``from_dict`` reads it back."""
        return {"sources": [asdict(source) for source in self.sources]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Audit:
        sources = []
        for entry in value["sources"]:
            reasons = {
                key: {name: Reason(**reason) for name, reason in entry[key].items()} for key in ("refused", "dropped")
            }
            sources.append(SourceAudit(**{**entry, **reasons}))
        return cls(sources)

    def table(self) -> Table:
        """The audit as a rich table, a column a source."""
        from rich.table import Table

        table = Table(title="supervision audit", title_justify="left")
        table.add_column("", no_wrap=True)
        for source in self.sources:
            table.add_column(source.name, justify="right", overflow="fold")
        for name, cells in self._lines().items():
            if any(cell != "-" for cell in cells):
                table.add_row(name, *cells)
        return table

    def _lines(self) -> dict[str, list[str]]:
        def each(cell) -> list[str]:
            return [cell(source) for source in self.sources]

        lines = {
            "format": each(lambda s: s.format),
            "rows": each(lambda s: f"{s.rows:,}"),
            "rows after limit": each(
                lambda s: ("~" if s.beyond_limit_estimated else "") + f"{s.beyond_limit:,}" if s.beyond_limit else "-"
            ),
            "kept rows": each(lambda s: f"{s.kept:,}"),
        }
        for kind in ("refused", "dropped"):
            for reason in sorted({name for source in self.sources for name in getattr(source, kind)}):
                lines[f"{kind}: {reason}"] = each(
                    lambda s, kind=kind, reason=reason: _count(getattr(s, kind).get(reason), s.rows)
                )
        lines |= {
            "duplicates": each(lambda s: _part(s.duplicates, s.rendered_rows)),
            "documents": each(lambda s: f"{s.documents:,}"),
            "tokens": each(lambda s: f"{s.tokens:,}"),
            "trained tokens": each(lambda s: _part(s.trained_tokens, s.tokens)),
            "truncated": each(lambda s: _part(s.truncated, s.documents)),
            "lost end-of-turn": each(lambda s: _part(s.lost_end, s.documents)),
            "masked documents": each(lambda s: _part(s.masked_documents, s.documents + s.masked_documents)),
            "start with 0/1/2+ BOS": each(lambda s: "-" if s.bos is None else "/".join(f"{n:,}" for n in s.bos)),
            "length p50/p95/max": each(lambda s: _quantiles(s.lengths)),
        }
        return lines

    def examples(self) -> list[str]:
        """``source: reason: file:line: detail`` for the first rows of every reason."""
        return [
            f"{source.name}: {example}"
            for source in self.sources
            for example in first_examples({**source.refused, **source.dropped}, each=EXAMPLES)
        ]


def first_examples(reasons: Mapping[str, Reason], each: int = 2) -> list[str]:
    """``file:line: reason: detail`` lines, a few for every reason."""
    return [example for reason in reasons.values() for example in reason.examples[:each]]


def length_summary(histogram: np.ndarray) -> dict[str, float]:
    """Mean and exact quantiles from counts by length: ``histogram[n]`` documents have n tokens."""
    total = int(histogram.sum())
    if not total:
        return {}
    cumulative = np.cumsum(histogram)
    out = {"mean": round(float((histogram * np.arange(len(histogram))).sum() / total), 2)}
    for quantile in QUANTILES:
        rank = max(1, int(np.ceil(quantile * total)))
        out["max" if quantile == 1.0 else f"p{quantile * 100:g}"] = int(np.searchsorted(cumulative, rank))
    return out


def _count(reason: Reason | None, rows: int) -> str:
    return "-" if reason is None else _part(reason.count, rows)


def _part(count: int, of: int) -> str:
    return f"{count:,} ({count / of:.1%})" if count and of else f"{count:,}"


def _quantiles(lengths: Mapping[str, float]) -> str:
    return "/".join(f"{lengths[key]:,}" for key in ("p50", "p95", "max")) if lengths else "-"
