"""The data module of every objective: sources in, micro-batches out, in an order that survives kill and resize.

The file is one class, whole: settings, parts, order, loaders and state are what Lightning asks of one object. What it
does with them is in ``parts``, ``units``, ``order``, ``loader`` and ``progress``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np

from ptl.data.audit import Audit, Thresholds
from ptl.data.batches import Layout
from ptl.data.easy_first import EasyFirst
from ptl.data.gym import check_apart
from ptl.data.loader import (
    AsPlanned,
    Loader,
    MicroBatch,
    ResumableLoader,
    RowDataset,
    eval_batches,
    prompt_batches,
    table_rows,
    train_batches,
)
from ptl.data.order import Plan, permutation_keys, permute
from ptl.data.parts import Part, Preparation, Split, open_part
from ptl.data.prepare import Prepared
from ptl.data.prepare import prepare as prepare_rows
from ptl.data.progress import Cursor, Position, epoch_batches, limited_batches, position_of
from ptl.data.render import Renderer, RenderPolicy, Truncation
from ptl.data.sources import Source
from ptl.data.tokenizer import load_tokenizer
from ptl.data.views import ChatView, View
from ptl.types import PromptBatch

_POLICY = RenderPolicy()
_THRESHOLDS = Thresholds()
_PREPARATION = Preparation()


class ChatDataModule(L.LightningDataModule):
    """Rows of many sources as batches for any objective.

    A *unit* is a row, or with ``pack_to`` a pack of rows. Each optimizer step takes the next ``world_size *
    accumulate_grad_batches * micro_batch_size`` units of a seeded order and deals them to ranks and micro-batches,
    balanced by tokens; its last, partial step in an epoch is filled with copies that carry no weight. Ranks that share
    their micro-batches (``model.sequence_parallel``) count as one and read the same. The position in
    the data is in every checkpoint, and a resume goes on there on any number of ranks, with any accumulation.

    Arguments:
        train: sources to learn from. ``Source.weight`` is how many times an epoch sees a source: 2.0 twice, 0.5 a half
            that changes with the epoch.
        val: sources to validate on, each seen once.
        val_fraction: share of the training conversations held out for validation, in [0, 1); not with ``val``.
        tokenizer: folder or hub name; None takes the model's own.
        template: chat template: a packaged name, the path of a .jinja file, or Jinja text; None takes the tokenizer's.
        policy: which turns are trained.
        max_length: most tokens of a document.
        truncation: what to do with a longer one.
        layout: ``packed``, documents end to end without padding; or ``padded``, a document a row, those of a
            micro-batch of similar length.
        pack_to: tokens of a pack; None makes each row a unit.
        micro_batch_size: units in a micro-batch of one rank.
        seed: of the order and of the packing.
        shuffle: False walks the units in the order they were made.
        easy_first: walk prompts by their column ``pass_rate`` in each epoch, the most often solved first; those of one
            rate in the order of ``seed`` and ``shuffle``. Rows without a rate are refused.
        num_workers: processes of a rank that read and collate batches.
        thresholds: shares of bad, masked and cut rows that stop the run.
        preparation: how rows are tokenised and kept.
        trust_remote_code: run Python code that comes with a tokenizer.

    Attributes:
        view: what the objective eats; set by ``bind``.

    Raises:
        ValueError: settings that exclude each other, with the keys to change.
    """

    def __init__(
        self,
        train: list[Source],
        *,
        val: list[Source] | None = None,
        val_fraction: float = 0.0,
        tokenizer: str | None = None,
        template: str | None = None,
        policy: RenderPolicy = _POLICY,
        max_length: int = 2048,
        truncation: Truncation = "error",
        layout: Layout = "packed",
        pack_to: int | None = None,
        micro_batch_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        easy_first: bool = False,
        num_workers: int = 0,
        thresholds: Thresholds = _THRESHOLDS,
        preparation: Preparation = _PREPARATION,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.train_sources, self.val_sources = list(train), list(val or [])
        self.val_fraction, self.max_length, self.pack_to = val_fraction, max_length, pack_to
        self.micro_batch_size, self.seed, self.num_workers = micro_batch_size, seed, num_workers
        self.tokenizer, self.template, self.policy = tokenizer, template, policy
        self.truncation: Truncation = truncation
        self.layout: Layout = layout
        self.shuffle, self.easy_first = shuffle, easy_first
        self.thresholds, self.preparation = thresholds, preparation
        self.trust_remote_code = trust_remote_code
        self.view: View = ChatView()
        self._parts: dict[str, Part] = {}
        self._by_rate: EasyFirst | None = None
        self._loaders: dict[str, Loader] = {}
        self._cursor = Cursor()
        self._check()

    def _check(self) -> None:
        if not self.train_sources:
            raise ValueError("data.train is empty: give at least one source, for example [{path: data.jsonl}]")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        if self.val_fraction and self.val_sources:
            raise ValueError("data.val and data.val_fraction exclude each other: remove one")
        for name, least in (("max_length", 2), ("micro_batch_size", 1), ("seed", 0), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be {least} or more, got {getattr(self, name)}")
        if self.pack_to is not None and self.pack_to < self.max_length:
            raise ValueError(
                f"data.pack_to {self.pack_to} is below data.max_length {self.max_length}, so a row may not fit a pack: "
                "raise data.pack_to or lower data.max_length"
            )
        if self.pack_to is not None and self.layout == "padded":
            raise ValueError("data.pack_to needs data.layout packed: a padded batch has one document a row")
        check_apart(self.train_sources, self.val_sources)

    def bind(self, *, view: View, tokenizer: str | None) -> None:
        """Tells the module what the objective eats, and the tokenizer to use where the user named none."""
        self.view = view
        self.tokenizer = self.tokenizer or tokenizer
        if view.ranks > 1 and self.layout == "padded":
            raise ValueError(
                f"model.sequence_parallel {view.ranks} shares packed rows: set data.layout to packed, got padded"
            )
        if view.samples and self.pack_to is not None:
            raise ValueError("data.pack_to is set, and answers to prompts are sampled one by one: remove data.pack_to")
        if self.easy_first and "pass_rate" not in view.features:
            raise ValueError(
                "data.easy_first orders prompts whose answers are sampled (GRPO, PPO) by their pass_rate, and this "
                f"objective learns from {view.record.__name__} records: remove data.easy_first"
            )

    @cached_property
    def renderer(self) -> Renderer:
        """What turns messages into tokens, in training as in chat.

        Raises:
            ValueError: no tokenizer is named.
        """
        if self.tokenizer is None:
            raise ValueError("data.tokenizer is not set and no model gives its own: set it to a folder or hub name")
        tokenizer = load_tokenizer(self.tokenizer, template=self.template, trust_remote_code=self.trust_remote_code)
        return Renderer(tokenizer, policy=self.policy)

    # ---- preparation ----

    def prepare(self) -> None:
        """Tokenises and packs, or opens what was kept; once a process. Runs before process groups exist.

        Raises:
            ValueError: rows or counts that cannot be trained on, with the source and the key to change.
        """
        if self._parts:
            return
        weights = tuple(source.weight for source in self.train_sources)
        train, fraction = self._prepared(self.train_sources), self.val_fraction
        parts = {"train": self._part(train, weights, Split(fraction=fraction, held_out=False) if fraction else None)}
        if self.val_sources:
            val = self._prepared(self.val_sources)
            parts["val"] = self._part(val, (1.0,) * len(self.val_sources), None)
        elif fraction:
            parts["val"] = self._part(train, (1.0,) * len(weights), Split(fraction=fraction, held_out=True))
        if self.easy_first:
            self._by_rate = EasyFirst(parts["train"], seed=self.seed, shuffle=self.shuffle)
        self._parts = parts

    def _prepared(self, sources: list[Source]) -> Prepared:
        prepared = prepare_rows(
            sources,
            view=self.view,
            renderer=self.renderer,
            max_length=self.max_length,
            truncation=self.truncation,
            max_bad_fraction=self.thresholds.max_bad_fraction,
            deduplicate=self.preparation.deduplicate,
            cache_dir=self.preparation.folder,
            num_proc=self.preparation.num_proc,
        )
        prepared.audit.check(self.thresholds)
        return prepared

    def _part(self, prepared: Prepared, weights: tuple[float, ...], split: Split | None) -> Part:
        return open_part(prepared, weights=weights, capacity=self.pack_to, seed=self.seed, split=split)

    def prepare_data(self) -> None:
        self.prepare()

    def setup(self, stage: str) -> None:
        self.prepare()
        if stage == "fit":
            self._cursor.reset()

    def teardown(self, stage: str) -> None:
        """Ends the loaders' worker processes."""
        for loader in self._loaders.values():
            loader.close()
        self._loaders = {}

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("exception")

    @property
    def audits(self) -> dict[str, Audit]:
        """The supervision audit of the prepared rows, by ``train`` and, with sources of its own, ``val``."""
        self.prepare()
        own = {"train", "val"} if self.val_sources else {"train"}
        return {name: part.prepared.audit for name, part in self._parts.items() if name in own}

    def prepared_rows(self, stage: str) -> Prepared:
        """The rows that ``TokenBatch.rows`` counts, in ``train``, ``val`` or ``test``.

        Those of ``val`` are the training rows where a fraction of them is held out.

        Raises:
            ValueError: the module has no validation rows.
        """
        self.prepare()
        part = self._parts.get("train" if stage == "train" else "val")
        if part is None:
            raise ValueError(f"there are no rows for {stage}: set data.val or data.val_fraction")
        return part.prepared

    def source_names(self, stage: str) -> tuple[str, ...]:
        """Names of the sources that ``TokenBatch.sources`` counts, in ``train``, ``val`` or ``test``."""
        self.prepare()
        part = self._parts.get("train" if stage == "train" else "val")
        return part.prepared.sources if part else ()

    def summary(self) -> dict[str, Any]:
        """Counts of units, tokens, steps, and how full the packs are, by part."""
        self.prepare()
        counts: dict[str, Any] = {name: part.units.summary() for name, part in self._parts.items()}
        return {**counts, "steps_per_epoch": self.steps_per_epoch}

    # ---- order ----

    def _train_plan(self, position: Position) -> Plan:
        plan = Plan(
            units=self._parts["train"].units.entries,
            seed=self.seed,
            epoch=position.epoch,
            world_size=self._shares,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            micro_batch_size=self.micro_batch_size,
            start=position.units,
            shuffle=self.shuffle,
            windows=self.view.windows,
            passes=self.view.passes,
            inner=position.inner,
            order=self._by_rate.of_epoch(position.epoch) if self._by_rate else None,
        )
        if position.inner and plan.window_size != position.window:
            raise ValueError(
                f"the checkpoint is {position.inner} steps into a rollout whose steps take {position.window} prompts, "
                f"and these ranks, accumulation and micro-batches take {plan.window_size}: keep world_size * "
                f"trainer.accumulate_grad_batches * data.micro_batch_size at {position.window}, or resume from a "
                "checkpoint between two rollouts"
            )
        return plan

    @property
    def _shares(self) -> int:
        """Micro-batches at a time: one a rank, or one for the ranks that share it."""
        return max(1, (self.trainer.world_size if self.trainer else 1) // self.view.ranks)

    @property
    def _rank(self) -> int:
        """Which of them is this rank's."""
        return (self.trainer.global_rank if self.trainer else 0) // self.view.ranks

    @property
    def _epoch_batches(self) -> int:
        return epoch_batches(self._train_plan(Position()))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, with the trainer's limit; schedules take it from here.

        ``trainer.estimated_stepping_batches`` would load the data before a checkpoint's position is known.
        """
        self.prepare()
        accumulate = self._train_plan(Position()).accumulate
        return -(-limited_batches(self.trainer, self._epoch_batches) // accumulate)

    # ---- loaders ----

    def train_dataloader(self) -> ResumableLoader:
        """Batches of this rank, from the loaded position on and then epoch after epoch.

        Raises:
            ValueError: ``trainer.limit_train_batches`` would cut an optimizer step in two.
        """
        accumulate = self._train_plan(Position()).accumulate
        batches = limited_batches(self.trainer, self._epoch_batches)
        if self.trainer is not None:
            if batches % accumulate and not self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
                raise ValueError(
                    f"trainer.limit_train_batches leaves {batches} micro-batches, which is no multiple of "
                    f"trainer.accumulate_grad_batches {accumulate}: set it to "
                    f"{max(1, batches // accumulate) * accumulate}"
                )
            self._cursor.expect(self.trainer, self._train_plan, batches)

        def passes() -> Iterator[MicroBatch | PromptBatch]:
            plan = self._cursor.begin(self.trainer, self._train_plan)
            if plan.accumulate != accumulate:
                raise ValueError(
                    f"accumulate_grad_batches changed from {accumulate} to {plan.accumulate} while training, which "
                    "would change the number of batches of an epoch: remove GradientAccumulationScheduler"
                )
            units = self._parts["train"].units
            if self.view.samples:
                yield from prompt_batches(plan, units, self._rank)
            else:
                yield from train_batches(plan, units, self._rank, bucket=self.layout == "padded")

        loader = ResumableLoader(
            AsPlanned() if self.view.samples else self._dataset("train"),
            passes,
            lambda: self._epoch_batches,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
            state=self.state_dict,
            load_state=self.load_state_dict,
        )
        self._keep("train", loader)
        return loader

    def val_dataloader(self) -> Loader | list[Loader]:
        """Batches of this rank's share of the validation rows, in their order; as many on every rank."""
        if "val" not in self._parts:
            return []
        units = self._parts["val"].units

        def plan() -> Plan:
            return Plan(
                units=units.entries, world_size=self._shares, micro_batch_size=self.micro_batch_size, shuffle=False
            )

        loader = Loader(
            self._dataset("val"),
            lambda: eval_batches(plan(), units, self._rank, bucket=self.layout == "padded"),
            lambda: plan().steps,
            num_workers=self.num_workers,
            pin_memory=self._pin_memory,
        )
        self._keep("val", loader)
        return loader

    def test_dataloader(self) -> Loader | list[Loader]:
        """The validation rows: there is no third part."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets the objective change the batch on its device before the step; see ``Objective.prepare``."""
        prepare = getattr(self.trainer.lightning_module, "prepare", None) if self.trainer else None
        return prepare(batch) if callable(prepare) else batch

    def rows(self, stage: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Prepared rows by number, as the view's ``encode`` made them, each with its ``source`` and its ``row``."""
        rows = self.prepared_rows(stage).rows.select_columns([*self.view.features, "source"]).with_format("arrow")
        return [{**row, "row": number} for number, row in zip(numbers, table_rows(rows[list(numbers)]))]

    def substitutes(self, epoch: int, positions: np.ndarray, turn: int) -> np.ndarray:
        """Other training rows, int64 [N], for positions of an epoch whose own were of no use.

        Arguments:
            epoch: as in ``Plan``.
            positions: int64 [N], in the epoch's order.
            turn: which substitute, from 1; each has an order of its own, the same on any number of ranks.
        """
        units = self._parts["train"].units
        entries = permute(positions, units.entries, permutation_keys(self.seed, epoch, turn))
        return units.rows(units.of_epoch(epoch, entries))[0]

    def _keep(self, part: str, loader: Loader) -> None:
        """Takes the place of the part's former loader, whose worker processes end."""
        if part in self._loaders:
            self._loaders[part].close()
        self._loaders[part] = loader

    def _dataset(self, part: str) -> RowDataset:
        pad_id = self.renderer.tokenizer.pad_token_id
        rows = self._parts[part].prepared.rows
        return RowDataset(rows, self.view, self.layout, pad_id if isinstance(pad_id, int) else 0)

    @property
    def _pin_memory(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    # ---- state ----

    def _identity(self) -> dict[str, Any]:
        """What a position in an epoch depends on, beside the code."""
        units = self._parts["train"].units
        order = {"seed": self.seed, "shuffle": self.shuffle, "easy_first": self._by_rate and self._by_rate.digest}
        return {"of": units.entries, "tokens": units.tokens, **order}

    def state_dict(self) -> dict[str, Any]:
        """The position after the last whole optimizer step; the same on every rank.

        ``epoch`` and ``units``, consumed in it over all ranks, with ``inner`` and ``window`` of a rollout that is not
        done with, and what they depend on: ``of`` units an epoch, ``tokens``, ``seed``, ``shuffle`` and, of pass rates
        that order them, a digest under ``easy_first``.
        """
        if not self._parts:
            return {}
        return {**asdict(self._cursor.position(self.trainer, self._train_plan)), **self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a position, with any number of ranks, accumulation and micro-batch size.

        Raises:
            ValueError: it lies inside an epoch of other data, or of another order.
        """
        if state_dict and (self.trainer is None or self.trainer.training):
            self.prepare()
            self._cursor.load(position_of(state_dict, self._identity()))

    def skip_to(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a later position than the checkpoint that the trainer resumed from, before its first batch.

        What lies between is not trained on. The epoch gets that much shorter.

        Raises:
            ValueError: as ``load_state_dict``.
        """
        assert self.trainer is not None
        self.prepare()
        batches = limited_batches(self.trainer, self._epoch_batches)
        self._cursor.jump(self.trainer, position_of(state_dict, self._identity()), self._train_plan, batches)
