"""Goes back to a checkpoint from before training went wrong, and past the data it went wrong on.

A rewind takes a fresh start of the process: the one that diverged chooses checkpoint and data, notes both in
``RUN/rewind.json`` and ends with exit code 87; the next attempt resumes from that checkpoint, as from any, and lets
its data go on where the former one stopped (Chowdhery et al. 2022, PaLM, section 5.1). Exact resumes would otherwise
repeat what went wrong bit by bit.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.record import run_folder
from ptl.callbacks.saved import latest_checkpoint
from ptl.data.durable import write_text
from ptl.data.module import ChatDataModule
from ptl.strategies.checkpoints import read_record

FILE = "rewind.json"
ASIDE = "set-aside"


class DivergedError(RuntimeError):
    """Training went wrong in a way that going on cannot mend."""


class RewindError(DivergedError):
    """Training went wrong, and the next attempt goes on from an earlier checkpoint with later data."""


@dataclass(frozen=True)
class Rewind:
    """Where the next attempt goes on.

    Attributes:
        checkpoint: path of the checkpoint in the run folder.
        step: optimizer steps that it holds.
        stopped: optimizer steps that were done when the run stopped; the data of those between is passed over.
        data: the data module's state there.
        number: which rewind of the run this is, from 1.
        reason: why.
    """

    checkpoint: str
    step: int
    stopped: int
    data: dict[str, Any]
    number: int
    reason: str


def read_rewind(run: Path) -> Rewind | None:
    """The last rewind of a run, if it had one."""
    path = run / FILE
    return Rewind(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def choose_rewind(trainer: L.Trainer, *, first_bad: int, most: int, reason: str) -> Rewind | None:
    """Chooses the newest whole checkpoint from before a step and notes it; None where there is none, or no more.

    Checkpoints of that step and later are moved to ``RUN/set-aside``, so that nothing resumes from them; where there is
    no other, the newest one stays and is taken: what was left out has not changed its weights. All ranks call this.

    Arguments:
        trainer: between two optimizer steps.
        first_bad: the first step, from 1, that went wrong.
        most: rewinds that a run may have.
        reason: what went wrong.
    """
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(data, ChatDataModule):
        return None
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoint):
            callback.settle(trainer)  # else what is still being copied would appear behind this choice
    # The position is a matter of all ranks' counts, and the same on each.
    state = data.state_dict()
    found: Rewind | None = None
    if trainer.is_global_zero:
        run = run_folder(trainer)
        former = read_rewind(run)
        number = 1 + (former.number if former else 0)
        checkpoint = _set_aside(run, first_bad) if number <= most else None
        if checkpoint is not None:
            path = str(checkpoint.relative_to(run))
            found = Rewind(path, step_of(checkpoint), trainer.global_step, state, number, reason)
            write_text(run / FILE, json.dumps(asdict(found), indent=2) + "\n")
    return trainer.strategy.broadcast(found)


def apply_rewind(trainer: L.Trainer) -> Rewind | None:
    """Moves the data of a run that was resumed from a rewind's checkpoint; before the first batch, on all ranks.

    A run that goes on from a later checkpoint has that behind it.

    Returns:
        The rewind, where it was applied.
    """
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    rewind = read_rewind(run_folder(trainer)) if trainer.is_global_zero and trainer.ckpt_path else None
    rewind = trainer.strategy.broadcast(rewind)
    if rewind is None or rewind.step != trainer.global_step or not isinstance(data, ChatDataModule):
        return None
    data.skip_to(rewind.data)
    return rewind


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a whole checkpoint holds, a file or a ZeRO folder."""
    if checkpoint.is_dir():
        return read_record(checkpoint).global_step
    return int(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["global_step"])


def _set_aside(run: Path, first_bad: int) -> Path | None:
    """The newest checkpoint of fewer steps than ``first_bad``, once the later ones are out of the way."""
    moved: list[tuple[Path, Path]] = []
    while (newest := latest_checkpoint(run)) is not None and step_of(newest) >= first_bad:
        target = _free(run / ASIDE / newest.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        newest.rename(target)
        moved.append((target, newest))
    if newest is None and moved:
        target, newest = moved[0]
        target.rename(newest)
    return newest


def _free(path: Path) -> Path:
    """The path, or with a number behind it where an earlier rewind has left something of that name."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())
