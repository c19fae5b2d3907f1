"""Which checkpoints a run folder holds: the newest whole one of the run's own, and what others have left there."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from ptl.callbacks.run_identity import run_id
from ptl.strategies.checkpoints import CheckpointError, latest_complete, read_record
from ptl.strategies.zero_checkpoints import RUN_KEY

FOLDER = "checkpoints"


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint of the most steps in a run folder, a file or a ZeRO folder; None where there is none.

    What a killed save left is passed over, and what another run has saved (``foreign_checkpoints``). Of two with as
    many steps the one written last is taken.

    Arguments:
        run_dir: the run folder, or its ``checkpoints``.
    """
    folder, own = _folder_and_run(run_dir)
    found = [(step, path.stat().st_mtime, path) for path, step, run in _whole_files(folder) if run in (None, own)]
    sharded = latest_complete(folder, skip=lambda record: record.run not in (None, own))
    if sharded is not None:
        record = read_record(sharded)
        found.append((record.global_step, record.saved_at, sharded))
    return max(found)[2] if found else None


def foreign_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Whole checkpoints in a run folder that carry another run's id: somebody has copied them there."""
    folder, own = _folder_and_run(run_dir)
    found = [path for path, _, run in _whole_files(folder) if run not in (None, own)]
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            with contextlib.suppress(CheckpointError):
                found += [path] if read_record(path).run not in (None, own) else []
    return sorted(found)


def _folder_and_run(run_dir: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """Where the checkpoints are, and the id of the run that the folder belongs to."""
    folder = Path(run_dir)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    return folder, run_id(folder.parent if folder.name == FOLDER else folder)


def _whole_files(folder: Path) -> Iterator[tuple[Path, int, str | None]]:
    """Single-file checkpoints that can be read, their optimizer steps and their run's id."""
    for path in folder.glob("*.ckpt") if folder.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            try:
                # Memory-mapped: only the structure is read, not the tensors.
                saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                yield path, int(saved["global_step"]), saved.get(RUN_KEY)
            except pickle.UnpicklingError:
                # Whole, but with objects that only its owner can vouch for: the name has to do.
                step = re.search(r"step=(\d+)", path.name)
                yield path, int(step.group(1)) if step else 0, None
            except (RuntimeError, OSError, EOFError, KeyError, ValueError):
                continue
