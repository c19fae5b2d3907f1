"""Lightning's CLI for ``ptl fit|validate|test|predict``: run folder, data prepared ahead, errors in a few words."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from ptl.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint, latest_checkpoint
from ptl.callbacks.export import Export
from ptl.callbacks.health import DivergedError, Health
from ptl.callbacks.jsonl import JsonlLogger
from ptl.callbacks.record import RunRecord
from ptl.callbacks.redact import redact
from ptl.callbacks.throughput import Throughput
from ptl.config_errors import explain
from ptl.data.audit import DUPLICATE
from ptl.data.module import ChatDataModule
from ptl.objectives.base import Objective
from ptl.rewards.panel import RewardError
from ptl.strategies.deepspeed import ZeROStrategy

_RUN_DIR = "PTL_RUN_DIR"
_TRACEBACK = "PTL_TRACEBACK"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and whether it goes on from a checkpoint.

    Attributes:
        dir: the run folder; by default ``runs/<objective>-<date>-<time>``, or ``runs/<objective>-<job>`` in a job of
            several processes.
        resume: ``never`` refuses a folder that holds checkpoints; ``auto`` goes on from its newest whole one, or
            starts where there is none.
    """

    dir: str | None = None
    resume: Literal["never", "auto"] = "never"


class Parser(LightningArgumentParser):
    """Argument parser whose errors are one line and whose option names are never completed by guess."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"{self.prog.split(' [')[0]}: error: {explain(message)}\n")


class SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration, without secrets, into the run folder and to the loggers."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        text = redact(self.parser.dump(self.config, skip_none=False))
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": text})


class PTLCLI(LightningCLI):
    """Objective and data module from layered YAML; nothing here knows which objective it is."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            Objective,
            ChatDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=Parser,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(args) if args is not None else None,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Run, "run")
        # Callbacks of every run have keys of their own, so that a user's `trainer.callbacks` list never drops them.
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(Export, "export")

    # ---- building ----

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run: Run = self._get(self.config_init, "run") or Run()
        self.run_dir = run_dir(run, type(self.model).__name__.lower())
        if self.subcommand == "fit":
            self.resume_from = _checkpoint_of(self.run_dir, run.resume)
        given = self._get(self.config_init, "trainer.logger")
        loggers: list[Logger] = [] if given in (None, True, False) else given if isinstance(given, list) else [given]
        strategy = self._get(self.config_init, "trainer.strategy")
        plugins = list(self._get(self.config_init, "trainer.plugins") or [])
        if not isinstance(strategy, ZeROStrategy):  # whose checkpoints are folders, published by itself
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(
            plugins=plugins,
            logger=[JsonlLogger(self.run_dir), *loggers],
            default_root_dir=str(self.run_dir),
            use_distributed_sampler=False,
            **kwargs,
        )

    def after_instantiate_classes(self) -> None:
        self.datamodule.bind(view=self.model.view, tokenizer=self.model.spec.name)

    # ---- running ----

    def before_fit(self) -> None:
        self.trainer.callbacks.append(RunRecord(self.run_dir))  # pyright: ignore[reportAttributeAccessIssue]
        if self.resume_from is not None:
            self.config_init["fit"]["ckpt_path"] = str(self.resume_from)
        # Before any process group exists, so that ranks that wait cannot run into a collective's time-out.
        self.datamodule.prepare()
        if rank_zero_only.rank == 0:
            for audit in self.datamodule.audits.values():
                Console().print(audit.table())
            if warning := leak_warning(self.datamodule):
                Console().print(warning, style="yellow", highlight=False)

    def before_validate(self) -> None:
        self.datamodule.prepare()

    before_test = before_validate
    before_predict = before_validate


def leak_warning(data: ChatDataModule) -> str | None:
    """What to say where rows that are held out may be trained on under another line number; None where they are not."""
    if not data.val_fraction:
        return None
    sources = data.audits["train"].sources
    repeated = sum(source.duplicates - source.dropped_by(DUPLICATE) for source in sources)
    if not repeated:
        return None
    return (
        f"{repeated:,} of {sum(source.rows for source in sources):,} rows are equal to an earlier one, and "
        "data.val_fraction splits by line: what is held out is partly trained on, and val/loss flatters. "
        "Set data.preparation.deduplicate: true"
    )


def run_dir(run: Run, objective: str) -> Path:
    """The run folder, the same for every rank of the job.

    Raises:
        ValueError: several processes were started by a launcher that names no job, and no folder was given.
    """
    if run.dir:
        return Path(run.dir)
    if _RUN_DIR in os.environ:  # set below by the process that launched this rank
        return Path(os.environ[_RUN_DIR])
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID")
    if job and job != "none":
        name = f"{objective}-{job}"
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several ranks but no job id to name the run folder by: pass --run.dir runs/NAME")
    else:
        name = f"{objective}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs") / name
    os.environ[_RUN_DIR] = str(folder)
    return folder


def _checkpoint_of(folder: Path, resume: str) -> Path | None:
    newest = latest_checkpoint(folder)
    if newest is not None and resume == "never":
        raise ValueError(
            f"the run folder {folder} already holds checkpoints: pass --run.resume auto to go on from {newest.name}, "
            "or another --run.dir"
        )
    return newest


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Takes back the run folder's variable, which the ranks that this process launches inherit."""
    before = os.environ.get(_RUN_DIR)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_RUN_DIR, None)


def run(argv: Sequence[str]) -> int:
    """Runs a training command; a user's mistake is one line on stderr and code 2.

    The traceback of a mistake is shown with ``PTL_TRACEBACK=1``; any other exception keeps its traceback.
    """
    sys.argv = [sys.argv[0], *argv]  # Lightning starts further ranks with the same command line
    with _own_environment():
        try:
            PTLCLI()
        except SystemExit as stop:
            return int(stop.code or 0)
        except (ValueError, OSError, MisconfigurationException, DivergedError, RewardError) as mistake:
            if os.environ.get(_TRACEBACK):
                traceback.print_exc()
            print(f"ptl: error: {redact(str(mistake))}", file=sys.stderr)
            if not os.environ.get(_TRACEBACK):
                print(f"ptl: set {_TRACEBACK}=1 to see where it was raised", file=sys.stderr)
            return 2
    return 0
