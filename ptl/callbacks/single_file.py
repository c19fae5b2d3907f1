"""Checkpoints of one file that are whole or absent: those of every strategy but ZeRO."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ptl.callbacks.saved import latest_checkpoint
from ptl.data.durable import replacing
from ptl.strategies.checkpoints import CheckpointError
from ptl.strategies.staging import Staging


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints that appear under their name when they are whole and on the disk.

    A save that fails or is killed leaves what was there before untouched. The file is written straight from the
    tensors, without a second copy of the checkpoint in memory.

    Attributes:
        staging: where a checkpoint is written first, to be copied to its place by a thread; None writes it there.
    """

    def __init__(self) -> None:
        self.staging: Staging | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint.

        Raises:
            CheckpointError: it cannot be written; the message names the newest whole checkpoint beside it.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        if self.staging is not None:
            self._save_staged(self.staging, checkpoint, target)
            return
        try:
            with replacing(target) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(cannot_write(target, _first_cause(error))) from error

    def _save_staged(self, staging: Staging, checkpoint: dict[str, Any], target: Path) -> None:
        staging.wait()
        local = staging.folder / target.name
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with open(local, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            local.unlink(missing_ok=True)
            raise CheckpointError(cannot_write(local, _first_cause(error), beside=target)) from error

        def copy() -> None:
            try:
                with replacing(target) as temporary:
                    shutil.copyfile(local, temporary)
            except OSError as error:
                raise CheckpointError(cannot_write(target, error)) from error
            finally:
                local.unlink(missing_ok=True)

        staging.start(copy, target)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; where another is being copied, once that is in its place."""
        if self.staging is None:
            super().remove_checkpoint(path)
        else:
            self.staging.behind(lambda: TorchCheckpointIO.remove_checkpoint(self, path))

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint.

        Raises:
            CheckpointError: the file is not whole, or it holds pickled code and ``weights_only`` is not False.
            FileNotFoundError: there is none.
        """
        if self.staging is not None:
            self.staging.wait()
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds pickled Python objects, which can run any code when loaded, or is not a checkpoint: "
                "load it with weights_only=False only if you know who made it"
            ) from error
        except FileNotFoundError:
            raise
        except (RuntimeError, EOFError, OSError) as error:
            raise CheckpointError(f"{path} is not whole: {error}; {_last_good(Path(path))}") from error


def cannot_write(target: Path, reason: object, beside: Path | None = None) -> str:
    """What to say where a checkpoint cannot be written, and which is the newest whole one.

    Arguments:
        beside: where the run's checkpoints are, if not where this one goes.
    """
    key = "dirpath" if beside in (None, target) else "local_dir"
    return (
        f"cannot write the checkpoint {target}: {reason}; {_last_good(beside or target)}. Free space, keep fewer "
        f"checkpoints (save_top_k) or set another {key}, then resume"
    )


def _last_good(target: Path) -> str:
    newest = latest_checkpoint(target.parent)
    return f"the newest whole checkpoint is {newest}" if newest else "there is no whole checkpoint beside it"


def _first_cause(error: BaseException) -> BaseException:
    """The system's error behind torch's: its writer reports only that it failed."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen or error
