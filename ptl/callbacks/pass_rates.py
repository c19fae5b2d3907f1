"""How often each prompt of an evaluation was solved, as a file to train on: filtered, or from easy to hard."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L

from ptl.callbacks.record import run_folder
from ptl.data.durable import replacing
from ptl.data.module import ChatDataModule
from ptl.data.prompts import record_of
from ptl.data.records import row_of
from ptl.rollout.evaluation import Rated
from ptl.rollout.ranks import agreed, of_all_ranks

FILE = "pass_rates.jsonl"
_CHUNK = 1024
_LOG = logging.getLogger(__name__)


class PassRates(L.Callback):
    """Writes the pass rate of each prompt of the latest evaluation to ``RUN/pass_rates.jsonl``, whole or not at all.

    A row is the prompt as format ``prompt`` reads it back, with ``pass_rate``, the share of its judged answers that
    ``evaluation.solved_by`` and ``threshold`` call right; ``samples``, how many were judged; and ``origin``, file and
    line that it came from. The prompts of all ranks are in the order of the data. Those of which no answer could be
    judged have no rate: they are left out, and their number is told. An evaluation that was cut by
    ``trainer.limit_val_batches`` rates what it saw; a sanity check writes nothing.

    It does nothing for objectives that sample no answers.
    """

    def __init__(self) -> None:
        self._rated: list[Rated] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rated = []

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        rollouts = getattr(pl_module, "rollouts", None)
        if rollouts is not None:
            self._rated += rollouts.rated

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if hasattr(pl_module, "rollouts") and not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.on_validation_batch_end(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_validation_end(trainer, pl_module)

    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        rated = sorted(one for own in of_all_ranks(self._rated) for one in own)
        self._rated = []

        def write() -> None:
            if trainer.is_global_zero:
                with replacing(run_folder(trainer) / FILE) as path, path.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(pl_module.data, rated))

        agreed(trainer.strategy, write, "wrote the pass rates")
        if unjudged := sum(one.rate is None for one in rated):
            _LOG.warning(
                "%d of %d prompts are not in %s: no answer to them could be judged.", unjudged, len(rated), FILE
            )


def rows(data: ChatDataModule, rated: Sequence[Rated]) -> Iterator[dict[str, Any]]:
    """Validation prompts with a rate as rows of format ``prompt``.

    Args:
        data: whose validation rows were rated.
        rated: some of them.
    """
    known = [(one, one.rate) for one in rated if one.rate is not None]
    for begin in range(0, len(known), _CHUNK):
        chunk = known[begin : begin + _CHUNK]
        for example, (one, rate) in zip(data.rows("val", [one.row for one, _ in chunk]), chunk):
            prompt = record_of(example["prompt"])
            yield {**row_of(prompt), "pass_rate": rate, "samples": one.judged, "origin": str(prompt.origin)}
