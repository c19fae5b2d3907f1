"""Weights & Biases for a run: who it is there, what is told of it, and training that goes on when W&B does not.

This is the one place that opens a W&B run. What the run folder says of a run (``RunRecord``) is told here too, so that
runs on other machines can be compared by it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ptl.callbacks import wandb_artifacts
from ptl.callbacks.exit_codes import REQUEUE, REWIND
from ptl.callbacks.redact import redact, redact_tree
from ptl.callbacks.run_identity import make_run_id, trial_id

STEP, TOKENS_SEEN = "trainer/global_step", "trainer/tokens_seen"
"""The x-axes: optimizer steps for all metrics, and real tokens of all ranks, which a chart can choose instead."""
FACTS = "facts"
"""Key of W&B's configuration with what is known of a run besides its configuration."""
LONGEST_TAG = 64
EXIT_CODES = {"finished": 0, "stopped": 0, "preempted": REQUEUE, "rewound": REWIND}

Mode = Literal["online", "offline", "disabled"]
Upload = Literal["nothing", "adapter", "export"]


class WandbRun(WandbLogger):
    """Lightning's W&B logger for a run folder: one W&B run for all attempts of a run, and never a reason to stop.

    The id is the run folder's own (``RUN/run.json``) unless ``WANDB_RUN_ID`` or a sweep's agent gives one, so each
    attempt goes on in the same W&B run, and offline attempts are joined by ``wandb sync``. Files lie in ``RUN/wandb``,
    or where ``WANDB_DIR`` says. What is None below is taken from W&B's own variable (``WANDB_PROJECT``,
    ``WANDB_RUN_GROUP``, ``WANDB_JOB_TYPE``, ``WANDB_NAME``, ``WANDB_NOTES``), else from the run.

    Where a server cannot be reached at the start, this attempt is written offline. Where that fails too, or W&B fails
    later, one line says so and training goes on without it; ``metrics.jsonl`` has everything.

    Sent are the configuration, facts and metrics, without secrets; not the terminal's text, and not W&B's own copy of
    the command line and of the code's changes, in which secrets cannot be found.

    Arguments:
        project: W&B project; ``ptl`` by default.
        entity: user or team; W&B's default for the account.
        group: runs that are compared; the name of the folder that holds the run folder by default.
        job_type: kind of run; the objective by default, as ``configs/objective`` names it.
        name: shown name; the run folder's by default.
        tags: besides those of the run: model, data sets, strategy, adapter, cluster.
        notes: free text.
        mode: ``online``, ``offline`` or ``disabled``; ``WANDB_MODE`` by default, else online.
        init_timeout: seconds to wait for a server at the start.
        finish_timeout: seconds to wait for uploads at the end; ``wandb sync`` sends what was left. 0 waits for all.
        upload: what is uploaded at the end besides references to files: ``adapter``, ``export``, or ``nothing``.
        settings: further fields of ``wandb.Settings``, such as ``{console: auto}``.

    Raises:
        ValueError: the wandb package is missing, a number is out of its range, or a setting is none of W&B's.
    """

    def __init__(
        self,
        *,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        name: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        mode: Mode | None = None,
        init_timeout: float = 60.0,
        finish_timeout: float = 60.0,
        upload: Upload = "nothing",
        settings: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "trainer.logger got WandbRun, expected the wandb package to be installed: pip install wandb"
            )
        if init_timeout <= 0 or finish_timeout < 0:
            raise ValueError(
                "trainer.logger: WandbRun.init_timeout must be above 0 and finish_timeout 0 or more, "
                f"got {init_timeout} and {finish_timeout}"
            )
        if upload not in ("nothing", "adapter", "export"):
            raise ValueError(f"trainer.logger: WandbRun.upload must be nothing, adapter or export, got {upload!r}")
        if settings:
            _check(settings)
        super().__init__(project=project or os.environ.get("WANDB_PROJECT") or "ptl")
        given = {"entity": entity, "group": group, "job_type": job_type, "name": name, "notes": notes}
        self._given = {key: value for key, value in given.items() if value is not None}
        self._defaults: dict[str, str] = {}
        self._tags = list(tags or os.environ.get("WANDB_TAGS", "").split(","))
        self._mode: str = mode or os.environ.get("WANDB_MODE") or "online"
        self._own_settings = {"init_timeout": init_timeout, "finish_timeout": finish_timeout, **(settings or {})}
        self.upload: Upload = upload
        self._run_dir = Path(".")
        self._facts: dict[str, Any] = {}
        self._status: str | None = None
        self._lost = False
        self._tokens_seen: float | None = None

    def bind(self, run_dir: str | os.PathLike[str], *, job_type: str | None = None, tags: Iterable[str] = ()) -> None:
        """Says which run it is; called before anything is logged.

        Args:
            run_dir: the run folder.
            job_type: kind of run, unless the user or ``WANDB_JOB_TYPE`` names one.
            tags: of the run, besides the user's.
        """
        self._run_dir = Path(run_dir)
        where = self._run_dir.resolve()
        named = {"name": where.name, "group": where.parent.name, "job_type": job_type}
        variables = {"name": "WANDB_NAME", "group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE"}
        self._defaults = {key: value for key, value in named.items() if value and not os.environ.get(variables[key])}
        self._tags += [tag for tag in tags if tag not in self._tags]

    # ---- the W&B run ----

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's own run, opened at the first use; one that takes everything and does nothing where W&B has failed."""
        if self._experiment is None:
            self._experiment = self._open()
        return self._experiment

    def tell(self, do: Callable[[Any], Any], extra: str | None = None) -> None:
        """Calls ``do`` with W&B's run on rank 0; where that fails, says so once and goes on without W&B.

        Args:
            do: takes the run.
            extra: name of something beside the metrics, without which W&B goes on.
        """
        if rank_zero_only.rank != 0 or self._lost:
            return
        try:
            do(self.experiment)
        except Exception as problem:
            if extra is None:
                self._lose(problem)
            else:
                _warn(f"W&B did not take {extra} ({_line(problem)})")

    def _open(self) -> Any:
        if self._lost:
            return _silent_run()
        modes = [self._mode] if self._mode in ("offline", "disabled") else [self._mode, "offline"]
        problems = []
        for mode in modes:
            try:
                run = self._init(mode)
                _define_axes(run)
            except Exception as problem:
                problems.append(problem)
                _reset()
                continue
            if problems:
                _warn(
                    f"W&B cannot be reached ({_line(problems[0])}); this attempt is written offline: "
                    f"wandb sync {run.settings.sync_dir}"
                )
            return run
        self._lose(problems[-1])
        return self._experiment

    def _init(self, mode: str) -> Any:
        import wandb

        # A W&B process that a notebook or an earlier program has named in the environment may be gone, or be on the
        # machine that submitted the job.
        os.environ.pop("WANDB_SERVICE", None)
        # A sweep's agent has asked its server for the id, which W&B takes from its variable by itself.
        ours = None if trial_id() else os.environ.get("WANDB_RUN_ID") or make_run_id(self._run_dir)
        folder = os.environ.get("WANDB_DIR")
        if not folder or (trial_id() and Path(folder) == Path.cwd()):  # an agent names its own where the user has none
            folder = str(self._run_dir)
        settings = {
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "x_disable_meta": True,
            **self._own_settings,
        }
        return wandb.init(
            project=None if trial_id() else self._project,  # the sweep's, and W&B would warn of another
            dir=folder,
            id=ours,
            resume="allow" if mode == "online" else None,
            mode=mode,  # pyright: ignore[reportArgumentType]
            reinit="create_new" if wandb.run is not None else None,
            tags=[tag[:LONGEST_TAG] for tag in self._tags if tag] or None,
            settings=wandb.Settings(**settings),
            **redact_tree({**self._defaults, **self._given}),
        )

    def _lose(self, problem: BaseException) -> None:
        if not self._lost:
            _warn(f"W&B has stopped ({_line(problem)}); training goes on, and metrics.jsonl has everything")
            _reset(self._experiment)
        self._lost = True
        self._experiment = _silent_run()

    # ---- what is told ----

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs one row; ``_step``, which is W&B's own count and begins at 0 in each offline attempt, means nothing."""
        self._tokens_seen = metrics.get("throughput/tokens_seen", self._tokens_seen)
        axes = {STEP: step, TOKENS_SEEN: self._tokens_seen}
        row = {**redact_tree(dict(metrics)), **{name: value for name, value in axes.items() if value is not None}}
        self.tell(lambda run: run.log(row))

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Logs a table; the rows of a list are made free of secrets."""

        def log(run: Any) -> None:
            import wandb

            names: Any = columns
            table = wandb.Table(columns=names, data=redact_tree(data), dataframe=dataframe)
            run.log({key: table, **({STEP: step} if step is not None else {})})

        self.tell(log)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Makes ``params``, nested as they are, W&B's configuration; an attempt may change what a former one said."""
        tree = redact_tree(vars(params) if isinstance(params, Namespace) else dict(params))
        self.tell(lambda run: run.config.update(tree, allow_val_change=True))

    @rank_zero_only
    def describe(self, facts: Mapping[str, Any], files: Iterable[Path] = ()) -> None:
        """Adds facts beside the configuration, under ``facts``, and small files of the run folder that are sent."""
        self._facts |= redact_tree(dict(facts))
        self.log_hyperparams({FACTS: self._facts})
        for path in files:
            self.tell(lambda run, path=path: run.save(str(path), base_path=str(self._run_dir), policy="now"), path.name)

    @rank_zero_only
    def watch_result(self, monitor: str, mode: Literal["min", "max"]) -> None:
        """Has W&B keep the best and the last value of the metric that is the result: ``val/loss.min``."""
        self.tell(lambda run: run.define_metric(monitor, step_metric=STEP, step_sync=True, summary=f"{mode},last"))

    @rank_zero_only
    def data_set(self, sources: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        """Refers to the files of the data, which stay where they are.

        Args:
            sources: path of each source by its label; what is no local path is named alone.
            facts: what is known of it, its fingerprint among it.
        """
        self.tell(
            lambda run: wandb_artifacts.log_data(run, redact_tree(dict(sources)), redact_tree(dict(facts))), "data"
        )

    @rank_zero_only
    def conclude(self, summary: Mapping[str, Any], status: str) -> None:
        """Writes the summary; a run that came to its end also refers to its export and its checkpoints.

        Args:
            summary: flat, by name.
            status: ``finished``, ``stopped``, ``preempted``, ``rewound``, ``failed`` or ``interrupted``.
        """
        self._status = status
        self.tell(lambda run: run.summary.update(redact_tree(dict(summary))))
        if status in ("finished", "stopped"):
            self.tell(lambda run: wandb_artifacts.log_outputs(run, self._run_dir, self.upload), "artifacts")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the W&B run; a later use opens it again, as another attempt."""
        if self._experiment is None:
            return
        known = 0 if status == "success" else 1
        code = known if self._status is None else EXIT_CODES.get(self._status, 1)
        self.tell(lambda run: run.finish(exit_code=code))
        if not self._lost:
            self._experiment = None

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Does nothing: Lightning's logger uploads files here, and passes over DeepSpeed's folders."""


def tell(logger: Any, do: Callable[[Any], Any]) -> None:
    """Calls ``do`` with the logger's W&B run where it has one: guarded in ``WandbRun``, bare in Lightning's own."""
    if isinstance(logger, WandbRun):
        logger.tell(do)
    elif isinstance(logger, WandbLogger):
        do(logger.experiment)


def _check(settings: dict[str, Any]) -> None:
    """Refuses at once what ``wandb.Settings`` would refuse, so that a slip of the pen is no lost network."""
    import wandb

    try:
        wandb.Settings(**settings)
    except (ValueError, TypeError) as problem:
        raise ValueError(
            f"trainer.logger: WandbRun.settings got {settings}, expected fields of wandb.Settings ({_line(problem)}): "
            "change them"
        ) from problem


def _define_axes(run: Any) -> None:
    run.define_metric(STEP)
    run.define_metric(TOKENS_SEEN)
    run.define_metric("*", step_metric=STEP, step_sync=True)


def _reset(own: Any = None) -> None:
    """Ends W&B's process, unless another run than ``own`` needs it: it would hold the id of a run that has failed."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        if wandb.run is None or wandb.run is own:
            wandb.teardown(1)


def _silent_run() -> Any:
    """A run whose every method does nothing."""
    try:
        import wandb

        return wandb.init(mode="disabled", reinit="create_new")
    except Exception:
        return DummyLogger().experiment


def _line(problem: BaseException) -> str:
    """A problem in one line, without secrets."""
    words = " ".join(redact(str(problem)).split())
    return f"{type(problem).__name__}: {words}"[:300] if words else type(problem).__name__


def _warn(text: str) -> None:
    sys.stderr.write(f"ptl: warning: {text}\n")
