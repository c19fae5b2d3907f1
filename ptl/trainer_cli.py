"""Lightning's CLI for ``ptl fit|validate|test|predict``: run folder, data prepared ahead, errors in a few words."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.exit_codes import REQUEUE, REWIND, PreemptedError
from ptl.callbacks.export import Export
from ptl.callbacks.facts import run_tags
from ptl.callbacks.health import DivergedError, Health, RewindError
from ptl.callbacks.jsonl import JsonlLogger
from ptl.callbacks.occupied import occupy
from ptl.callbacks.pass_rates import PassRates
from ptl.callbacks.preemption import Preemption
from ptl.callbacks.record import RunRecord, run_folder
from ptl.callbacks.redact import redact
from ptl.callbacks.run_identity import run_id, trial_id
from ptl.callbacks.saved import foreign_checkpoints, latest_checkpoint
from ptl.callbacks.single_file import AtomicCheckpointIO
from ptl.callbacks.stragglers import Stragglers
from ptl.callbacks.throughput import Throughput
from ptl.callbacks.wandb_run import WandbRun
from ptl.callbacks.watchdog import Watchdog
from ptl.config_errors import explain
from ptl.data.audit import DUPLICATE
from ptl.data.module import ChatDataModule
from ptl.objectives.base import Objective
from ptl.rewards.panel import RewardError
from ptl.strategies.cpu_products import computes_in_bf16, fast_bf16
from ptl.strategies.deepspeed import ZeROStrategy
from ptl.strategies.flight import set_flight_recorder
from ptl.strategies.meeting import LAUNCHED, meet
from ptl.strategies.slurm import check_job

_RUN_DIR = "PTL_RUN_DIR"
_SWEEP_DIR = "PTL_SWEEP_DIR"
_TRACEBACK = "PTL_TRACEBACK"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and whether it goes on from a checkpoint.

    Attributes:
        dir: the run folder; by default ``runs/<objective>-<date>-<time>``, ``runs/<objective>-<job>`` in a job of
            several processes, or ``runs/<sweep>/<id>`` for a trial of a W&B sweep.
        resume: ``never`` refuses a folder that holds checkpoints; ``auto`` goes on from its newest whole one, or
            starts where there is none.
        meeting_minutes: how long the ranks of a job wait for each other at the start; then those missing are named.
    """

    dir: str | None = None
    resume: Literal["never", "auto"] = "never"
    meeting_minutes: float = 10.0


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
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                # As JSON, since YAML would read the mask of a secret as a list.
                logger.log_hyperparams(json.loads(self.parser.dump(self.config, skip_none=False, format="json")))
            else:
                logger.log_hyperparams({"config": text})


class PTLCLI(LightningCLI):
    """Objective and data module from layered YAML; nothing here knows which objective it is."""

    def __init__(
        self,
        args: Sequence[str] | None = None,
        run: bool = True,
        command: str | None = None,
        stack: contextlib.ExitStack | None = None,
    ) -> None:
        self.command, self.stack = command, stack or contextlib.ExitStack()
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

    def subcommands(self) -> dict[str, set[str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Those of Lightning, or the one command that is asked: the parser of each takes half a second to build."""
        found = LightningCLI.subcommands()
        return found if self.command is None else {self.command: found[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(Run, "run")
        # Callbacks of every run have keys of their own, so that a user's `trainer.callbacks` list never drops them.
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(Stragglers, "stragglers")
        parser.add_lightning_class_args(Export, "export")

    # ---- building ----

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run: Run = self._get(self.config_init, "run") or Run()
        self.run_dir = run_dir(run, type(self.model).__name__.lower())
        if self.subcommand == "fit":
            if rank_zero_only.rank == 0:
                self.occupied = occupy(self.run_dir)  # kept: closing it would let go of the folder
            self.resume_from = _checkpoint_of(self.run_dir, run.resume)
        given = self._get(self.config_init, "trainer.logger")
        loggers: list[Logger] = [] if given in (None, True, False) else given if isinstance(given, list) else [given]
        strategy = self._get(self.config_init, "trainer.strategy")
        plugins = list(self._get(self.config_init, "trainer.plugins") or [])
        if self.subcommand == "fit":
            check_job(self._get(self.config_init, "trainer.devices"), self._get(self.config_init, "trainer.num_nodes"))
        if SLURMEnvironment.detect():
            # The batch script requeues, when the run has left at a step boundary; Lightning would save in the handler.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        if not isinstance(strategy, ZeROStrategy):  # whose checkpoints are folders, published by itself
            plugins.append(AtomicCheckpointIO())
        trainer = super().instantiate_trainer(
            plugins=plugins,
            logger=[JsonlLogger(self.run_dir), *loggers],
            # Not the run folder itself in a fit: Lightning would go on from any hpc_ckpt_*.ckpt that lies there.
            default_root_dir=str(self.run_dir / "lightning" if self.subcommand == "fit" else self.run_dir),
            use_distributed_sampler=False,
            **kwargs,
        )
        for logger in loggers:
            if isinstance(logger, WandbRun):
                kind = type(self.model).__module__.rpartition(".")[2]  # as configs/objective names it
                sources = [source.label for source in self.datamodule.train_sources]
                logger.bind(self.run_dir, job_type=kind, tags=run_tags(self.model.spec, sources, trainer.strategy))
        return trainer

    def after_instantiate_classes(self) -> None:
        self.datamodule.bind(view=self.model.view, tokenizer=self.model.spec.name)
        self.trainer.callbacks.append(PassRates())  # pyright: ignore[reportAttributeAccessIssue]

    # ---- running ----

    def before_fit(self) -> None:
        watched = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, Checkpoint) and c.monitor]
        result = {"monitor": watched[0].monitor, "mode": watched[0].mode} if watched else {}
        self.trainer.callbacks.append(RunRecord(self.run_dir, **result))  # pyright: ignore[reportAttributeAccessIssue]
        if self.resume_from is not None:
            self.config_init["fit"]["ckpt_path"] = str(self.resume_from)
        if self.trainer.strategy.root_device.type == "cuda":
            set_flight_recorder(self.run_dir / "flight")
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        if environment is not None:
            run: Run = self._get(self.config_init, "run") or Run()
            self.meeting = meet(
                environment, 60 * run.meeting_minutes
            )  # kept: rank 0's process group listens through it
        # Before any process group exists, so that ranks that wait cannot run into a collective's time-out.
        self.datamodule.prepare()
        if rank_zero_only.rank == 0:
            for audit in self.datamodule.audits.values():
                Console().print(audit.table())
            if warning := leak_warning(self.datamodule):
                Console().print(warning, style="yellow", highlight=False)

        self._compute_bf16()

    def before_validate(self) -> None:
        self.datamodule.prepare()
        self._compute_bf16()

    before_test = before_validate
    before_predict = before_validate

    def _compute_bf16(self) -> None:
        """Sees to it that a run in bf16 is not a hundred times slower on a CPU that has no instructions for it."""
        if self.trainer.strategy.root_device.type != "cpu":
            return
        if computes_in_bf16(str(self.trainer.precision), self.model.spec.dtype):
            slowdown = self.stack.enter_context(fast_bf16())
            if slowdown is not None and rank_zero_only.rank == 0:
                print(
                    f"ptl: this CPU computes {slowdown:.0f} times slower in bf16 than in fp32: "
                    "matrix products are made in fp32 and rounded to bf16",
                    file=sys.stderr,
                )


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
    if trial := trial_id():
        # By its id: another agent, on another node, may be given a trial that was preempted.
        return Path(os.environ.get(_SWEEP_DIR) or Path("runs") / os.environ["WANDB_SWEEP_ID"]) / trial
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
    trial, own = trial_id(), run_id(folder)
    if trial and own not in (None, trial):
        raise ValueError(
            f"the run folder {folder} is that of run {own}, and this is trial {trial} of a sweep: leave --run.dir out "
            "of the sweep's command, and each trial has a folder of its own"
        )
    if (strange := foreign_checkpoints(folder)) and rank_zero_only.rank == 0:
        print(
            f"ptl: warning: {strange[0]}{' and others' if len(strange) > 1 else ''} was saved by another run and is "
            "left alone; to start from it, pass it as --ckpt_path",
            file=sys.stderr,
        )
    newest = latest_checkpoint(folder)
    if newest is not None and resume == "never":
        raise ValueError(
            f"the run folder {folder} already holds checkpoints: pass --run.resume auto to go on from {newest.name}, "
            "or another --run.dir"
        )
    return newest


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Takes back the variables that the ranks which this process launches inherit."""
    before = {name: os.environ.get(name) for name in (_RUN_DIR, LAUNCHED)}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _own_arguments(argv: Sequence[str]) -> Iterator[None]:
    """Makes these the process's arguments: Lightning starts further ranks with them, the run folder keeps them."""
    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """A signal before the first step, while data and models are loaded, ends the run as one that comes later.

    From the first step on ``Preemption`` takes the signals.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return
        if number == signal.SIGTERM:
            # Mostly srun's, because another rank has failed: whose code shall be the job's, which is the highest.
            sys.exit(1)
        raise PreemptedError(0, signal.Signals(number).name, "nothing, the first step had not begun")

    process = os.getpid()
    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, leave) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def run(argv: Sequence[str]) -> int:
    """Runs a training command; a user's mistake is one line on stderr and code 2.

    The traceback of a mistake is shown with ``PTL_TRACEBACK=1``; any other exception keeps its traceback.
    """
    with _own_environment(), _own_arguments(argv), _leaving_on_signals(), contextlib.ExitStack() as stack:
        try:
            PTLCLI(command=argv[0], stack=stack)
        except SystemExit as stop:
            return int(stop.code or 0)
        except PreemptedError as left:
            # One rank says so by its code; srun would kill the others, which may still be closing their loggers.
            if rank_zero_only.rank != 0:
                return 0
            print(f"ptl: {left}; the same command with --run.resume auto goes on", file=sys.stderr)
            return REQUEUE
        except RewindError as diverged:
            if rank_zero_only.rank != 0:
                return 0
            print(f"ptl: rewind: {diverged}", file=sys.stderr)
            return REWIND
        except (ValueError, OSError, MisconfigurationException, DivergedError, RewardError) as mistake:
            if os.environ.get(_TRACEBACK):
                traceback.print_exc()
            print(f"ptl: error: {redact(str(mistake))}", file=sys.stderr)
            if not os.environ.get(_TRACEBACK):
                print(f"ptl: set {_TRACEBACK}=1 to see where it was raised", file=sys.stderr)
            return 2
    return 0
