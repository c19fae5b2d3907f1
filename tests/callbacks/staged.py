"""What processes do for the tests of checkpoints that go through a disk of the node."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from ptl.callbacks.checkpoint import Checkpoint
from ptl.callbacks.exit_codes import PreemptedError
from ptl.callbacks.preemption import Preemption
from ptl.callbacks.saved import latest_checkpoint
from ptl.strategies.deepspeed import ZeROStrategy, consolidated_state_dict
from tests import ranks
from tests.callbacks.parts import Toy, loader, packed, trainer

STEPS = 8
PIECE = 4096
_copyfile, _copy = shutil.copyfile, shutil.copy


def slow_disk(seconds_a_piece: float) -> None:
    """Copies take this long for every 4 KiB, as to a busy file system; what writes at once is as fast as ever."""

    def copyfile(source: Any, target: Any, **_: Any) -> Any:
        with open(source, "rb") as read, open(target, "wb", buffering=0) as written:
            while piece := read.read(PIECE):
                written.write(piece)
                time.sleep(seconds_a_piece)
        return target

    shutil.copyfile = copyfile  # shutil.copy calls it by this name


class StopAt(Callback):
    """Signals its own process at an optimizer step."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGUSR1)


class Watch(Callback):
    """What lies in the folder at the start of each step, and how many copies are under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[list[str]] = []
        self.copies = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(sorted(path.name for path in self.folder.glob("[!.]*")) if self.folder.exists() else [])
        self.copies = max(self.copies, sum(t.name == "checkpoint copy" for t in threading.enumerate()))


def fit(folder: Path, local: Path | None, *callbacks: Any, strategy: Any, **options: Any) -> Any:
    """A fit of eight steps that goes on from the newest checkpoint of the folder."""
    torch.manual_seed(1)
    newest = latest_checkpoint(folder)
    done = 0
    if newest is not None:
        done = int(newest.name.split("=")[1].split(".")[0])
    saver = Checkpoint(every_n_train_steps=1, local_dir=str(local) if local else None, **options)
    run = trainer(folder, [*callbacks, saver], strategy=strategy, devices=ranks.world_size(), max_steps=STEPS)
    # As many as an epoch has, from the first that is not done with; Lightning counts on from there.
    batches = [packed([8, 8], trained=4, seed=10 * ranks.rank() + done + step) for step in range(STEPS)]
    module = Toy(pause=0.02)
    run.fit(module, loader(batches), ckpt_path=str(newest) if newest else None)
    return module


def _weights(module: Any, path: Path) -> None:
    state = consolidated_state_dict(module.policy)
    if ranks.rank() == 0:
        torch.save(state, path)


def zero(folder: str, local: str, stage: int) -> dict[str, Any]:
    """The same run plainly and through the node's disk; then one that is asked to leave, and what is kept."""
    plain = fit(Path(folder) / "plain", None, strategy=ZeROStrategy(stage=stage))  # pyright: ignore[reportArgumentType]
    _weights(plain, Path(folder) / "plain.pt")
    slow_disk(0.005)
    watch = Watch(Path(folder) / "staged/checkpoints")
    module = fit(Path(folder) / "staged", Path(local), watch, strategy=ZeROStrategy(stage=stage))  # pyright: ignore[reportArgumentType]
    _weights(module, Path(folder) / "staged.pt")
    result: dict[str, Any] = {
        "seen": watch.seen,
        "copies": watch.copies,
        "left": os.path.exists(local) and os.listdir(local),
    }
    try:
        fit(
            Path(folder) / "asked",
            Path(local),
            StopAt(4, rank=1),
            Preemption(),
            strategy=ZeROStrategy(stage=stage),  # pyright: ignore[reportArgumentType]
        )
    except PreemptedError as left:
        result["asked"] = [left.step, left.checkpoint, str(latest_checkpoint(Path(folder) / "asked"))]
    return result


def failing(folder: str, local: str) -> dict[str, Any]:
    """The copy of rank 1 fails at the third save: every rank ends together with a message."""

    def copy(source: Any, target: Any, **how: Any) -> Any:
        if ranks.rank() == 1 and "step=00000003" in str(target):
            raise OSError(28, "No space left on device")
        return _copy(source, target, **how)

    shutil.copy = copy
    from ptl.strategies.checkpoints import CheckpointError

    try:
        fit(Path(folder), Path(local), strategy=ZeROStrategy(stage=2))
    except CheckpointError as error:
        return {"error": str(error), "newest": str(latest_checkpoint(folder))}
    return {}


def killed(folders: list[str], local: str, ports: list[int]) -> dict[str, Any]:
    """Runs that die by SIGKILL while a checkpoint is copied, each at a moment and on a rank that its number decides.

    Each is a child of its rank, forked after the imports, which take longer than all of it.
    """
    ends = []
    for number, (folder, port) in enumerate(zip(folders, ports)):
        dead = Path(f"{folder}.dead")
        child = os.fork()
        if not child:
            os.environ["MASTER_PORT"] = str(port)
            _killed(Path(folder), Path(local), number)
            os._exit(0)
        ended, status = 0, 0
        deadline = None
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if deadline is None and dead.exists():
                deadline = time.monotonic() + 1
            if deadline is not None and time.monotonic() > deadline and not ended:
                os.kill(child, signal.SIGKILL)  # it waits for the one that is dead
            time.sleep(0.05)
        dead.touch()
        ends.append(os.waitstatus_to_exitcode(status))
    return {"ends": ends}


def _killed(folder: Path, local: Path, number: int) -> None:
    slow_disk(0.004)
    chance = random.Random(number)
    after, share, victim = chance.choice((3, 4, 5)), chance.random(), chance.choice(range(ranks.world_size()))

    def watch() -> None:
        while not (folder / f"checkpoints/.step={after:08d}.ckpt.partial").exists():
            time.sleep(0.001)
        time.sleep(0.3 * share)
        os.kill(os.getpid(), signal.SIGKILL)

    if ranks.rank() == victim:
        threading.Thread(target=watch, daemon=True).start()
    fit(folder, local, strategy=ZeROStrategy(stage=2))


def resumed(folders: list[str], local: str, out: str) -> dict[str, Any]:
    """Goes on from what killed runs have left; each ends with its weights."""
    left = []
    for number, folder in enumerate(folders):
        module = fit(Path(folder), Path(local), strategy=ZeROStrategy(stage=2))
        _weights(module, Path(out) / f"{number}.pt")
        left.append(sorted(path.name for path in (Path(folder) / "checkpoints").iterdir()))
    return {"left": left, "local": os.path.exists(local) and os.listdir(local)}
