"""When a run saves its checkpoints, where, and which of them stay.

How they are written whole or not at all: ``single_file`` beside this, and for ZeRO's folders ``ptl.strategies``.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ptl.callbacks.record import run_folder
from ptl.callbacks.run_identity import run_id
from ptl.callbacks.saved import FOLDER
from ptl.callbacks.single_file import AtomicCheckpointIO, cannot_write
from ptl.callbacks.throughput import excluded
from ptl.data.durable import TEMPORARY
from ptl.strategies.agreement import StepAgreement
from ptl.strategies.checkpoints import MARKER, CheckpointError
from ptl.strategies.staging import Staging, node_folder
from ptl.strategies.zero_checkpoints import RUN_KEY, CheckpointedZeRO


class Checkpoint(ModelCheckpoint):
    """Saves checkpoints into ``RUN/checkpoints``, whole or not at all.

    Without ``monitor`` the newest is kept, whatever validation says: a resume goes on from it, so that a killed run
    loses the steps since then and no more; the last of ``max_steps`` or ``max_epochs`` is saved too. With ``monitor``
    the best ones are kept; use both, one entry each.

    Arguments:
        dirpath: where to; ``checkpoints`` in the run folder by default.
        filename: pattern of the names.
        monitor: logged metric whose best values are kept; None keeps the newest.
        mode: whether the lower (``min``) or the higher (``max``) value is the better.
        save_top_k: checkpoints that are kept; without ``monitor`` 1, -1 for all or 0 for none.
        every_n_train_steps: optimizer steps between saves; by default each epoch's end is saved, or with ``monitor``
            each validation.
        every_n_minutes: minutes of rank 0's clock between saves, besides those by steps or epochs.
        local_dir: folder on a disk of each node, such as ``$SLURM_TMPDIR``, that every save of the trainer goes to
            first: training goes on while a thread copies it to ``dirpath``, where it appears whole and under its name
            once all ranks' parts are there. One copy is under way at a time: the next save waits for it. The end of the
            fit and a preemption wait too. None writes to ``dirpath`` at once.
        kwargs: the other arguments of Lightning's ModelCheckpoint.

    Raises:
        CheckpointError: from the training loop, on every rank. Before anything is touched: the disk lacks the room.
            With ``local_dir`` also within two optimizer steps of a copy that has failed.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        filename: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        every_n_minutes: float | None = None,
        local_dir: str | None = None,
        enable_version_counter: bool = False,
        auto_insert_metric_name: bool = False,
        **kwargs: Any,
    ) -> None:
        if every_n_minutes is not None and (every_n_minutes <= 0 or monitor is not None):
            raise ValueError(
                f"checkpoint.every_n_minutes must be above 0 and goes without monitor, got {every_n_minutes} with "
                f"monitor {monitor!r}"
            )
        if local_dir is not None and kwargs.get("save_last") == "link":
            raise ValueError(
                "checkpoint.save_last link would point at what is not copied yet: set save_last to true, or remove "
                "checkpoint.local_dir"
            )
        if monitor is None and every_n_train_steps is None:
            kwargs.setdefault("save_on_train_epoch_end", True)
        super().__init__(
            dirpath=dirpath,
            filename=filename or ("step={step:08d}" if monitor is None else "best-step={step:08d}"),
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=enable_version_counter,
            auto_insert_metric_name=auto_insert_metric_name,
            **kwargs,
        )
        self.every_n_minutes = every_n_minutes
        self.local_dir = local_dir
        self._slowest_write = 0.0
        self._staging: Staging | None = None
        self._agreement: StepAgreement | None = None
        self._saved_at = time.monotonic()
        self._wanted = self._deferred = False
        self._newest = ""
        self._saved_step = -1
        self._resumed_from: Path | None = None

    # ---- what is saved when ----

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = os.path.realpath(run_folder(trainer) / FOLDER)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.is_global_zero and "://" not in str(self.dirpath):
            for leftover in Path(self.dirpath).glob(f".*{TEMPORARY}"):
                if leftover.is_file():
                    leftover.unlink()
                elif not (leftover / MARKER).is_file():  # else it is whole, and perhaps all there is
                    shutil.rmtree(leftover, ignore_errors=True)
        if self.local_dir is not None:
            self._stage(trainer, self.local_dir)

    def _stage(self, trainer: L.Trainer, local_dir: str) -> None:
        """Has the trainer's saves go through the nodes' disks; all ranks find a mistake together."""
        place = _staging_place(trainer)
        if "://" in str(self.dirpath) or place is None:
            what = self.dirpath if place is not None else type(trainer.strategy.checkpoint_io).__name__
            raise ValueError(
                f"checkpoint.local_dir copies files that ptl has written to a folder, got {what}: remove it"
            )
        problem = None
        if place.staging is not None:
            problem = "two checkpoint callbacks set local_dir: all saves of the trainer go there, so set it once"
        else:
            try:
                self._staging = Staging(node_folder(local_dir, Path(str(self.dirpath)), trainer.global_rank))
                self._staging.open()
            except (OSError, ValueError) as error:
                problem = (
                    f"checkpoint.local_dir {local_dir} cannot be written to on rank {trainer.global_rank}: {error}"
                )
        if not trainer.strategy.reduce_boolean_decision(problem is None):
            raise ValueError(problem or f"checkpoint.local_dir {local_dir} cannot be written to on another rank's node")
        place.staging = self._staging

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        resumed = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
        inside = resumed is not None and self.dirpath is not None and Path(self.dirpath) in resumed.parents
        self._resumed_from = resumed if inside else None
        self._saved_step = trainer.global_step if inside else -1
        watched = self.every_n_minutes or self._staging is not None
        self._agreement = StepAgreement(trainer.world_size) if watched else None
        self._saved_at = time.monotonic()
        self._wanted = self._deferred = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._ends_step(trainer, batch_idx):
            # Lightning would write the step that a run has resumed from once more, in the place of what it came from.
            return
        step = trainer.global_step
        if self._agreement is not None:
            waited = (time.monotonic() - self._saved_at) / 60
            due = bool(self.every_n_minutes) and trainer.is_global_zero and waited >= (self.every_n_minutes or 0)
            failing = self._staging is not None and self._staging.failed
            due, failing = self._agreement.exchange([due, failing])
            self._wanted = due or self._wanted
            if failing:
                self.settle(trainer)
        if self.monitor is None and step != trainer.max_steps and pauses_after(trainer, batch_idx):
            every = self._every_n_train_steps
            self._deferred = self._wanted or bool(every and step and step % every == 0)
            return
        self._timed(super().on_train_batch_end, trainer, pl_module, outputs, batch, batch_idx)
        if step == trainer.max_steps:
            self._save_last(trainer)
        if self._wanted:
            self.save_now(trainer)
        self._drop_resumed(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._timed(super().on_validation_end, trainer, pl_module)
        if self._deferred and not trainer.sanity_checking and not trainer.is_last_batch:
            self.save_now(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._timed(super().on_train_epoch_end, trainer, pl_module)
        if self._deferred:
            self.save_now(trainer)
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._save_last(trainer)
        self._drop_resumed(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.settle(trainer)
        if self._agreement is not None:
            self._agreement.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.settle(trainer)
            self._unstage(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        if self._staging is not None:
            try:
                self._staging.leave()
            except CheckpointError as error:
                rank_zero_warn(str(error))
            self._unstage(trainer)

    def _unstage(self, trainer: L.Trainer) -> None:
        place = _staging_place(trainer)
        if self._staging is not None and place is not None:
            self._staging.close()
            self._staging = place.staging = None

    def settle(self, trainer: L.Trainer) -> None:
        """Waits until what has been saved is in its place. All ranks call it together.

        Raises:
            CheckpointError: on every rank, it could not be copied there.
        """
        place = _staging_place(trainer)
        if place is None or place.staging is None:
            return
        problem = None
        with excluded(trainer):
            try:
                place.staging.wait()
            except CheckpointError as error:
                problem = str(error)
            # Rank 0's thread is the one that has heard of every rank's mistakes.
            problem = trainer.strategy.broadcast(problem)
        if problem:
            raise CheckpointError(problem)
        self._drop_resumed(trainer)

    def request(self) -> None:
        """Saves at the end of this optimizer step, or behind the validation or the end of the epoch that follows it.

        Lightning takes what follows the batch of a checkpoint for done when the run goes on, so that a checkpoint in
        front of a validation would lose it. All ranks call this at the same step.
        """
        self._wanted = True

    def saved(self, step: int) -> bool:
        """Whether this optimizer step has been saved."""
        return self._saved_step == step and not self._wanted

    @property
    def slowest_save(self) -> float:
        """Seconds that a save may take, by what this process has seen: writing, and with ``local_dir`` two copies, one
        that is still under way and its own."""
        return self._slowest_write + (2 * self._staging.slowest if self._staging is not None else 0.0)

    @property
    def newest(self) -> str:
        """Path of what was saved last."""
        return self._newest or self.best_model_path

    def _ends_step(self, trainer: L.Trainer, batch_idx: int) -> bool:
        return trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def _timed(self, save: Callable[..., None], *arguments: Any) -> None:
        started, before = time.monotonic(), self._saved_step
        save(*arguments)
        if self._saved_step != before:
            self._slowest_write = max(self._slowest_write, time.monotonic() - started)

    def _save_last(self, trainer: L.Trainer) -> None:
        """Saves the step that ends the training, so that a longer run can go on from it.

        Here and not at the end of the fit: by then Lightning has counted a partial epoch as done.
        """
        if self.monitor is None and self.save_top_k and not getattr(trainer, "fast_dev_run", False):
            self.save_now(trainer)

    def save_now(self, trainer: L.Trainer) -> None:
        """Saves this optimizer step unless that is done. All ranks call it together.

        A callback with ``monitor`` saves it beside what it keeps.
        """
        self._wanted = self._deferred = False
        if self._saved_step == trainer.global_step:
            return
        metrics = {"step": torch.tensor(trainer.global_step), "epoch": torch.tensor(trainer.current_epoch)}
        path = self.format_checkpoint_name({**trainer.callback_metrics, **metrics})
        if self.monitor is not None:
            path = os.path.join(str(self.dirpath), f"step={trainer.global_step:08d}{self.FILE_EXTENSION}")
        previous = self.best_model_path
        if self.monitor is None:
            self.best_model_path = path  # so that the checkpoint itself names it
        self._timed(trainer.save_checkpoint, path, self.save_weights_only)
        self._newest = path
        if self.monitor is None and self.save_top_k == 1 and previous not in ("", path):
            trainer.strategy.remove_checkpoint(previous)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """All ranks see whether there is room, before anything is written or removed."""
        self.settle(trainer)
        problem = self._no_room(Path(self.dirpath or "."), checkpoint, pl_module) if trainer.is_global_zero else None
        problem = trainer.strategy.broadcast(problem)
        if self._staging is not None and problem is None:
            problem = self._no_room(self._staging.folder, checkpoint, pl_module)
            if not trainer.strategy.reduce_boolean_decision(problem is None):
                problem = (
                    problem or f"the disk of another rank's node lacks room in checkpoint.local_dir {self.local_dir}"
                )
        if problem:
            raise CheckpointError(problem)
        if own := run_id(run_folder(trainer)):
            checkpoint[RUN_KEY] = own
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def _no_room(self, folder: Path, checkpoint: Mapping[str, Any], module: nn.Module) -> str | None:
        """Says that the disk of a folder cannot hold this checkpoint, when that is certain."""
        if "://" in str(folder):
            return None
        present = next((parent for parent in (folder, *folder.parents) if parent.exists()), Path("."))
        trained = [p for p in module.parameters() if p.requires_grad]
        needed = tensor_bytes(checkpoint.get("optimizer_states")) + tensor_bytes(trained)
        free = shutil.disk_usage(present).free
        if needed <= free:
            return None
        reason = f"it needs at least {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        return cannot_write(folder / "the next one", reason, beside=Path(self.dirpath or ".") / "the next one")

    def _drop_resumed(self, trainer: L.Trainer) -> None:
        """Removes the checkpoint that this attempt resumed from, once a newer one is there.

        Lightning keeps it for ever, one more for each time that the run is resumed.
        """
        old = self._resumed_from
        if old is None or self.monitor is not None or self.save_top_k != 1:
            return
        # The old one names as the best what it was saved as: where a kill has left it under a hidden name, or somebody
        # has renamed it, that is not there, and the old one is all there is.
        newest = Path(self.best_model_path) if self.best_model_path else old
        # One that is still being copied will do: a removal waits for it.
        copied = self._staging is not None and self._staging.target == newest
        if newest.resolve() != old and (newest.exists() or copied):
            self._resumed_from = None
            trainer.strategy.remove_checkpoint(str(old))


def pauses_after(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation or the end of the epoch follows this batch."""
    if trainer.is_last_batch:
        return True
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or interval is None or interval == float("inf"):
        return False
    if every is not None and (trainer.current_epoch + 1) % every:
        return False
    batches = batch_idx + 1 if every is not None else trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return batches % int(interval) == 0


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, Mapping):
        return sum(tensor_bytes(item) for item in tree.values())
    if isinstance(tree, list | tuple):
        return sum(tensor_bytes(item) for item in tree)
    return 0


def _staging_place(trainer: L.Trainer) -> CheckpointedZeRO | AtomicCheckpointIO | None:
    """What writes the trainer's checkpoints, and may write them to a disk of the node first."""
    if isinstance(trainer.strategy, CheckpointedZeRO):
        return trainer.strategy
    io = trainer.strategy.checkpoint_io
    return io if isinstance(io, AtomicCheckpointIO) else None
