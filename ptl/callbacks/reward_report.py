"""How well a reward model orders answers at the end of its training: a page, a plot and their numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from ptl.callbacks.record import run_folder
from ptl.callbacks.redact import redact_tree
from ptl.callbacks.throughput import log_metrics, logged_step
from ptl.data import reward_page
from ptl.data.durable import replacing, write_text

NAME = "reward_report"
REPORT, PAGE, PLOT = "report.json", "report.md", "reliability.png"
STAGES = ("val", "train")
"""In the order in which they are shown: what the model was not trained on comes first."""
NUMBERS = ("accuracy", "tau", "margin", "ece", "reward_mean", "reward_std")


class RewardReport(L.Callback):
    """Writes ``RUN/reward_report/``: ``report.json``, ``report.md`` and ``reliability.png``; with W&B, there too.

    The measures are those that the objective made last: of validation, over all its rows, and of the last epoch's
    training rows as they went by, while the model was still changing. Nothing is computed again.

    Arguments:
        console: print the table.
    """

    def __init__(self, *, console: bool = True) -> None:
        self.console = console

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tells at the start what would fail at the end.

        Raises:
            ValueError: an objective that measures no rankings.
        """
        if stage == "fit" and not isinstance(getattr(pl_module, "measured", None), Mapping):
            raise ValueError(
                f"RewardReport needs an objective that measures rankings, got {type(pl_module).__name__}: use "
                "ptl.objectives.reward.RewardModeling, or remove the callback"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        measured: Mapping[str, Any] = pl_module.measured  # pyright: ignore[reportAssignmentType]
        stages = {stage: measured[stage] for stage in STAGES if stage in measured}
        problem: Exception | None = None
        if trainer.is_global_zero and stages:
            try:
                report = redact_tree({"step": trainer.global_step, "stages": stages})
                folder = run_folder(trainer) / NAME
                write(report, folder)
                self._publish(trainer, report, folder)
            except (ValueError, OSError) as error:
                problem = error
        # Rank 0's mistake is every rank's: none waits for one that has left.
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem

    def _publish(self, trainer: L.Trainer, report: Mapping[str, Any], folder: Path) -> None:
        numbers = {
            f"{NAME}/{stage}/{name}": measures[name]
            for stage, measures in report["stages"].items()
            for name in NUMBERS
            if measures[name] is not None
        }
        log_metrics(trainer, numbers)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(numbers)
                logger.log_image(f"{NAME}/plot", [str(folder / PLOT)], step=logged_step(trainer))
        if self.console:
            lines = reward_page.table(report["stages"], "rows")
            Console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def page(report: Mapping[str, Any]) -> str:
    """The report as a page of Markdown."""
    stages = report["stages"]
    lines = [f"# Reward report, step {report['step']}", "", *reward_page.table(stages, "rows"), ""]
    lines += ["## Accuracy by length", "", *reward_page.length_table(stages, "rows"), ""]
    if "train" in stages:
        lines += ["Training rows are measured as they go by, while the model still changes.", ""]
    lines += ["## How it was measured", "", *(f"- {line}" for line in reward_page.METHOD), ""]
    return "\n".join(lines)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Writes the three files, each whole or not at all."""
    write_text(folder / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / PAGE, page(report))
    with replacing(folder / PLOT) as temporary:
        reward_page.draw(report["stages"], temporary, f"Reward model, step {report['step']}")
