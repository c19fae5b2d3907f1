"""Rows that a report measures models on: their batches, and the questions in them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ptl.data.loader import MicroBatch, RowDataset
from ptl.data.order import Plan, permutation_keys, permute
from ptl.data.parts import Part, Split, open_part
from ptl.data.prepare import prepare
from ptl.data.render import Renderer
from ptl.data.sources import Source
from ptl.types import TokenBatch

if TYPE_CHECKING:
    from ptl.data.module import ChatDataModule

Task = Literal["none", "exact", "number"]
_NUMBER = re.compile(r"(?<![\d.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_ENDS = " \t\n.!?\"'"


class Question(NamedTuple):
    """A prompt and the answer that its row gives, as ids: the row's last trained turn and all before it."""

    source: int
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class HeldRows:
    """Prepared rows, and which of their units are measured.

    Attributes:
        part: rows and units.
        units: int64 [U], the chosen units, in their order.
    """

    part: Part
    units: np.ndarray

    @property
    def sources(self) -> tuple[str, ...]:
        """Names that ``TokenBatch.sources`` counts."""
        return self.part.prepared.sources

    @property
    def rows(self) -> np.ndarray:
        """int64, the chosen rows."""
        return self.part.units.rows(self.units)[0]

    def batches(self, data: ChatDataModule, rank: int, world_size: int) -> Iterator[TokenBatch]:
        """This rank's share of the rows as batches of the data module's layout; as many on every rank.

        The union over ranks is the same rows whatever their number.
        """
        pad_id = data.renderer.tokenizer.pad_token_id
        pad = pad_id if isinstance(pad_id, int) else 0
        dataset = RowDataset(self.part.prepared.rows, data.view, data.layout, pad)
        units = self.part.units
        plan = Plan(units=len(units), world_size=world_size, micro_batch_size=data.micro_batch_size)
        for start in range(0, len(self.units), plan.window_size):
            window = self.units[start : start + plan.window_size]
            for members, real in zip(*plan.share(window, units.sizes(window), rank, data.layout == "padded")):
                rows, counts = units.rows(members)
                weight = float(units.loss_weights(members[real]).sum())
                yield dataset[MicroBatch(rows, np.repeat(~real, counts), weight)]

    def questions(self, renderer: Renderer, task: Task, most: int) -> list[Question]:
        """Up to ``most`` of the rows that end in a whole answer; with ``number``, one that holds a number.

        Plain text is no question. The choice is seeded and the same on every rank.
        """
        rows = self.rows
        order = permute(np.arange(len(rows)), len(rows), permutation_keys(0, len(rows)))
        found: list[Question] = []
        table = self.part.prepared.rows
        for row in rows[order].tolist():
            if len(found) == most:
                break
            example = table[row]
            spans = example["spans"]
            if len(spans) < 2 or spans[-2] < 2 or example["ids"][spans[-1] - 1] not in renderer.terminators:
                continue
            prompt, answer = example["ids"][: spans[-2]], example["ids"][spans[-2] : spans[-1]]
            if task != "number" or last_number(text_of(renderer, answer)) is not None:
                found.append(Question(example["source"], prompt, answer))
        return found


def held_rows(data: ChatDataModule, general: Sequence[Source] | None, most: int) -> HeldRows:
    """The validation rows of a data module, or with ``general`` those sources as the module would prepare them.

    Args:
        data: bound to what its objective eats.
        general: sources that the module does not know, all of whose rows are held out.
        most: units to measure; of more, a seeded choice, the same on every rank.

    Raises:
        ValueError: there are no validation rows, or the sources cannot be prepared.
    """
    split = None
    sources = list(general or data.val_sources)
    if not sources:
        if not data.val_fraction:
            raise ValueError(
                "DistillReport needs held-out rows: set data.val_fraction, for example to 0.05, or data.val"
            )
        sources, split = data.train_sources, Split(fraction=data.val_fraction, held_out=True)
    prepared = prepare(
        sources,
        view=data.view,
        renderer=data.renderer,
        max_length=data.max_length,
        truncation=data.truncation,
        max_bad_fraction=data.thresholds.max_bad_fraction,
        deduplicate=data.preparation.deduplicate,
        cache_dir=data.preparation.folder,
        num_proc=data.preparation.num_proc,
    )
    prepared.audit.check(data.thresholds)
    weights = (1.0,) * len(sources)
    part = open_part(prepared, weights=weights, capacity=data.pack_to, seed=data.seed, split=split)
    count = len(part.units)
    if not count:
        raise ValueError(
            f"DistillReport found no held-out row: data.val_fraction {data.val_fraction} of {len(prepared.lengths)} "
            "rows holds none out; raise it, or set data.val"
        )
    chosen = permute(np.arange(count), count, permutation_keys(0, count))[:most]
    return HeldRows(part, np.sort(chosen))


# ---- answers ----


def text_of(renderer: Renderer, ids: Sequence[int]) -> str:
    """An answer's words: without the tokens that end it and without a think block before it."""
    kept = list(ids)
    while kept and kept[-1] in renderer.terminators:
        kept.pop()
    return str(renderer.tokenizer.decode(kept, skip_special_tokens=False)).rpartition("</think>")[2].strip()


def is_right(task: Task, answer: str, reference: str) -> bool:
    """Whether an answer says what the reference says.

    ``exact``: the same text, apart from case, white space, the Unicode form of a letter and marks at the ends.
    ``number``: the same last number, in English notation: ``1,000.50`` equals ``1000.5``.
    """
    if task == "number":
        wanted = last_number(reference)
        return wanted is not None and last_number(answer) == wanted
    return _plain(answer) == _plain(reference)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, or None."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_ENDS)
