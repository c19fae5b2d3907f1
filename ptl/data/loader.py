"""The loader that Lightning iterates: micro-batches planned in the main process, read and collated where torch says.

It is an iterable of its own around ``torch.utils.data.DataLoader``. Lightning therefore never replaces its sampler,
and nothing is read, planned or forked before the first batch is asked for: by then a checkpoint's position is loaded,
whatever asked for the loader before (Lightning issue #20550).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ptl.data.batches import Layout
from ptl.data.order import Plan
from ptl.data.units import Units
from ptl.data.views import View
from ptl.data.workers import outlive_signals
from ptl.types import PromptBatch, Turn


class MicroBatch(NamedTuple):
    """What a micro-batch is made of; all that a worker process is told.

    Attributes:
        rows: int64 [D], rows of the prepared data.
        filler: bool [D], True where the row only fills a place and carries no loss weight.
        window_weight: sum of the loss weights over the optimizer window and all ranks.
    """

    rows: np.ndarray
    filler: np.ndarray
    window_weight: float


def train_batches(plan: Plan, units: Units, rank: int, *, bucket: bool) -> Iterator[MicroBatch]:
    """The micro-batches of one rank from ``plan.start`` to the end of the epoch."""
    for step in range(plan.steps):
        window = units.of_epoch(plan.epoch, plan.window(step))
        window_weight = float(units.loss_weights(window).sum())
        for members, real in zip(*plan.share(window, units.sizes(window), rank, bucket)):
            rows, counts = units.rows(members)
            yield MicroBatch(rows, np.repeat(~real, counts), window_weight)


def eval_batches(plan: Plan, units: Units, rank: int, *, bucket: bool) -> Iterator[MicroBatch]:
    """The micro-batches of one rank over all units once; each has its own weight as ``window_weight``."""
    for step in range(plan.steps):
        window = plan.window(step)
        for members, real in zip(*plan.share(window, units.sizes(window), rank, bucket)):
            rows, counts = units.rows(members)
            yield MicroBatch(rows, np.repeat(~real, counts), float(units.loss_weights(members[real]).sum()))


def prompt_batches(plan: Plan, units: Units, rank: int) -> Iterator[PromptBatch]:
    """The prompts of one rank from ``plan.start`` to the end of the epoch, micro-batch by micro-batch.

    Each micro-batch names all prompts that the rank answers in its rollout, so that whoever sees the first one can
    answer them all; who has answered them goes on. Places of a last, partial window that stay empty name no prompt.
    """
    shared: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for step in range(plan.steps):
        place = plan.locate(step)
        if place.first not in shared:
            shared = {place.first: _prompts(plan, units, rank, place.first, place.count)}
        rows, positions, windows = shared[place.first]
        start = plan.start + place.first * plan.window_size
        for micro in range(plan.accumulate):
            turn = Turn(plan.epoch, start, place.count, windows, place.window, micro, plan.accumulate)
            yield PromptBatch(rows, positions, np.ones(len(rows), bool), turn)


def _prompts(plan: Plan, units: Units, rank: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, positions in the epoch and windows of a rank's prompts in a rollout."""
    rows, positions, windows = [], [], []
    for window in range(count):
        at = plan.positions(first + window)
        own = units.of_epoch(plan.epoch, plan.units_at(at))
        deal = plan.share(np.arange(len(at)), units.sizes(own), rank)
        mine = deal.units[deal.real]
        rows.append(units.rows(own[mine])[0])
        positions.append(at[mine])
        windows.append(np.full(len(mine), window))
    return np.concatenate(rows), np.concatenate(positions), np.concatenate(windows)


class AsPlanned(Dataset[Any]):
    """What is planned is the batch."""

    def __getitem__(self, index: Any) -> Any:
        return index


class RowDataset(Dataset[Any]):
    """Micro-batches out of memory-mapped rows: ``dataset[MicroBatch]`` is the view's batch.

    Args:
        rows: prepared rows, a ``datasets.Dataset``.
        view: collates them.
        layout: of the batches.
        pad_id: id that fills padded rows.
    """

    def __init__(self, rows: Any, view: View, layout: Layout, pad_id: int) -> None:
        self._rows = rows.select_columns([*view.features, "source"]).with_format("arrow")
        self._view = view
        self._layout: Layout = layout
        self._pad_id = pad_id

    def __getitem__(self, index: MicroBatch) -> Any:
        numbers = index.rows.tolist()
        examples = [
            {**(self._view.without_weight(example) if filler else example), "row": number}
            for example, number, filler in zip(table_rows(self._rows[numbers]), numbers, index.filler.tolist())
        ]
        return self._view.collate(examples, layout=self._layout, pad_id=self._pad_id, window_weight=index.window_weight)


def table_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of an Arrow table as dicts; lists of numbers are numpy views, everything else plain Python values."""
    columns = {name: _values(table.column(name).combine_chunks()) for name in table.column_names}
    return [{name: values[row] for name, values in columns.items()} for row in range(table.num_rows)]


def _values(column: pa.Array) -> Sequence[Any]:
    if not pa.types.is_list(column.type) or not pa.types.is_primitive(column.type.value_type):
        return column.to_pylist()
    flat = column.values.to_numpy(zero_copy_only=False)
    return [flat[begin:end] for begin, end in zip(column.offsets.to_pylist(), column.offsets.to_pylist()[1:])]


class _Planned(Sampler[Any]):
    """Hands the planned micro-batches to torch as indices."""

    def __init__(self, batches: Callable[[], Iterable[Any]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches())


def _as_is(batch: Any) -> Any:
    return batch


class Loader:
    """Iterates planned micro-batches as collated batches.

    Args:
        dataset: makes a batch of a ``MicroBatch``.
        batches: called when the first batch of a pass is asked for.
        count: batches of a whole pass, for ``len``; called each time.
        num_workers: processes that read and collate; they stay between passes. 0 does it in this process.
        pin_memory: page-locked batches, for a copy to a GPU.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Callable[[], Iterable[MicroBatch | PromptBatch]],
        count: Callable[[], int],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self._dataset, self._batches, self._count = dataset, batches, count
        self._num_workers, self._pin_memory = num_workers, pin_memory
        self._loader: DataLoader[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._loader is None:
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=_Planned(self._batches),
                collate_fn=_as_is,
                num_workers=self._num_workers,
                worker_init_fn=outlive_signals,
                persistent_workers=self._num_workers > 0,
                pin_memory=self._pin_memory,
                generator=torch.Generator(),  # torch draws a seed each pass; the run's own generator is left alone
            )
        yield from self._loader

    def close(self) -> None:
        """Ends the worker processes; a later pass starts others."""
        self._loader = None

    def __len__(self) -> int:
        return self._count()


class ResumableLoader(Loader):
    """A ``Loader`` whose state Lightning may save and load; it is the data module's, and the same on every rank.

    Lightning warns of a loader without state that a resumed epoch is not exact. The position comes from the data
    module, which holds it whether or not Lightning hands it to the loader as well.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Callable[[], Iterable[MicroBatch | PromptBatch]],
        count: Callable[[], int],
        *,
        state: Callable[[], dict[str, Any]],
        load_state: Callable[[Mapping[str, Any]], None],
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(dataset, batches, count, num_workers=num_workers, pin_memory=pin_memory)
        self._state = state
        self._load_state = load_state

    def state_dict(self) -> dict[str, Any]:
        return self._state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._load_state(state)
