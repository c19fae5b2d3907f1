"""What a run would train on, made visible: every token of a document, the trained ones marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptl.data.batches import mask_of
from ptl.data.encode import trained_tokens
from ptl.data.files import resolve
from ptl.data.groups import RankingView
from ptl.data.prompts import PromptView
from ptl.data.readers import first_rows, rows_of
from ptl.data.records import parse_row
from ptl.data.render import Renderer, RenderError, Truncation
from ptl.data.sources import RECORD_OF, BadRow, Source, check_record, detect_format
from ptl.data.views import ChatView, Example, View
from ptl.types import Origin, Prompt, Ranking

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerFast

TRAINED, NOT_TRAINED, SPECIAL = "green", "dim", "bold"
OPEN, CLOSE = "⟦", "⟧"


class Segment(NamedTuple):
    """Consecutive tokens of equal loss weight, special ones apart from the others."""

    text: str
    weight: float
    special: bool


class Previewed(NamedTuple):
    """A row and its documents, or why it has none."""

    origin: Origin
    documents: list[Example]
    problem: str | None


def preview_rows(
    source: Source, *, view: View, renderer: Renderer, max_length: int, truncation: Truncation, rows: int
) -> Iterator[Previewed]:
    """The first rows of a source as they would be prepared, refused ones included.

    Arguments and errors as for ``prepare``.
    """
    files = resolve(source)
    row_format = detect_format(source, () if source.format != "auto" else first_rows(source, files=files))
    check_record(source, row_format, view.record)
    for origin, row in islice(rows_of(source, files), rows):
        try:
            record = parse_row(row, row_format, source, origin)
            made = view.encode([record], renderer, max_length, truncation)[0]
        except BadRow as bad:
            yield Previewed(origin, [], str(bad))
            continue
        if isinstance(made, RenderError):
            yield Previewed(origin, [], str(made))
        else:
            yield Previewed(origin, [shown for example in made for shown in view.documents(example)], None)


def view_of(sources: Sequence[Source]) -> View:
    """The view that reads the sources' rows: of rankings ``RankingView``, of prompts ``PromptView``, else ``ChatView``.

    Raises:
        ValueError: they hold more than one kind, or a source's format cannot be told.
    """
    records = {}
    for source in sources:
        row_format = detect_format(source, () if source.format != "auto" else first_rows(source))
        records[RECORD_OF[row_format]] = source.path
    for record, kind in ((Ranking, "rankings"), (Prompt, "prompts")):
        if record in records and len(records) > 1:
            other = next(path for of, path in records.items() if of is not record)
            raise ValueError(f"{records[record]} holds {kind} and {other} does not: look at them one at a time")
    return RankingView() if Ranking in records else PromptView(room=0) if Prompt in records else ChatView()


def segments(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[Segment]:
    """The document cut where the loss weight changes and around special tokens; together all of its tokens."""
    ids = np.asarray(example["ids"])
    mask = mask_of(len(ids), example["spans"], example["span_weights"])
    special = np.isin(ids, sorted(_special_ids(tokenizer)))
    edges = np.flatnonzero((np.diff(mask) != 0) | (np.diff(special) != 0)) + 1
    return [
        Segment(_said(ids, int(start), int(end), tokenizer), float(mask[start]), bool(special[start]))
        for start, end in zip([0, *edges], [*edges, len(ids)])
    ]


def _said(ids: np.ndarray, start: int, end: int, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of ``ids[start:end]`` in its place: some tokenizers drop the first space of what they decode."""
    before, until = (str(tokenizer.decode(ids[:stop].tolist(), skip_special_tokens=False)) for stop in (start, end))
    own = str(tokenizer.decode(ids[start:end].tolist(), skip_special_tokens=False))
    return until[len(before) :] if until.startswith(before) else own


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def painted(parts: Sequence[Segment], *, colour: bool) -> Text:
    """The segments as one text: trained green, the rest dim, special tokens bold, line feeds shown as ⏎.

    A weight other than 1 stands before its segment, as ``×0.5``. Without colour trained runs stand in ``⟦ ⟧``.
    """
    from rich.text import Text

    out = Text(no_wrap=False, overflow="fold")
    before = 0.0
    for text, weight, special in parts:
        shown = text.replace("\r", "␍").replace("\n", "⏎\n")
        if weight != before:
            if before and not colour:
                out.append(CLOSE)
            if weight and not colour:
                out.append(OPEN)
            if weight not in (0.0, 1.0):
                out.append(f"×{weight:g} ", "bold yellow" if colour else "")
        style = f"{TRAINED if weight else NOT_TRAINED}{' ' + SPECIAL if special else ''}"
        out.append(shown, style if colour else "")
        before = weight
    if before and not colour:
        out.append(CLOSE)
    return out


def headline(origin: Origin, example: Example, number: int, count: int) -> str:
    """One line about a document: where it comes from, its tokens, and what befell it."""
    trained, length = trained_tokens(example), int(example["length"])
    notes = [name for key, name in (("truncated", "truncated"), ("lost_end", "lost its end-of-turn")) if example[key]]
    part = f", document {number} of {count}" if count > 1 else ""
    part += f", {example['note']}" if "note" in example else ""
    return f"{origin}{part}: {length:,} tokens, {trained:,} trained ({trained / max(1, length):.0%})" + "".join(
        f", {note}" for note in notes
    )
