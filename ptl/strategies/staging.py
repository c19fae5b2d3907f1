"""Checkpoints that go to a disk of the node first and are copied from there while training goes on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ptl.strategies.checkpoints import CheckpointError

_FAREWELL = 60.0
"""Seconds that a run which ends by an error waits for the other ranks' copies once its own is there."""


class Staging:
    """A process's folder on a disk of its node, and the copy that is under way from it: one at a time, in a thread.

    What a killed process has left in the folder is removed when the next one begins, and all of it at the end.

    Arguments:
        folder: this process's own.

    Attributes:
        slowest: seconds of the slowest copy so far.
        target: where the copy that is under way goes; None where there is none.
        group: of the ranks whose copies make one checkpoint, for nobody but the copying threads, so that what they say
            to each other never stands among the collectives of training; None until there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slowest = 0.0
        self.target: Path | None = None
        self.group: Any = None
        self._lock = threading.Lock()
        self._own_part = threading.Event()
        self._behind: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last copy has failed and ``wait`` has not said so yet."""
        return self._failure is not None

    def open(self) -> None:
        """Makes the folder, empty.

        Raises:
            OSError: it cannot be made or written to.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "probe").write_bytes(b"x")
        (self.folder / "probe").unlink()

    def start(self, copy: Callable[[], None], target: Path) -> None:
        """Runs ``copy``, which makes ``target``, in a thread, once the former one is done.

        Raises:
            CheckpointError: the former one failed.
        """
        self.wait()
        self.target = target
        self._own_part.clear()
        # A daemon, so that a copy that hangs does not keep a process alive that ends for another reason.
        self._thread = threading.Thread(target=self._run, args=(copy,), name="checkpoint copy", daemon=True)
        self._thread.start()

    def own_part_done(self) -> None:
        """Called by a copy whose rest is waiting for other ranks."""
        self._own_part.set()

    def behind(self, action: Callable[[], None]) -> None:
        """Runs ``action``, such as the removal of what the copy replaces, when the copy has succeeded: never where it
        failed, at once where none is under way."""
        with self._lock:
            if self._thread is not None:
                self._behind.append(action)
                return
        if not self.failed:
            action()

    def wait(self) -> None:
        """Waits for the copy that is under way.

        Raises:
            CheckpointError: it failed, or one that was done before has and nobody has been told.
        """
        thread = self._thread
        if thread is not None:
            thread.join()
        failure, self._failure = self._failure, None
        if isinstance(failure, CheckpointError):
            raise failure
        if failure is not None:
            raise CheckpointError(f"copying a checkpoint from {self.folder} failed: {failure!r}") from failure

    def leave(self) -> None:
        """Waits as ``wait`` does, at the end of a run that an error has ended: for the others not for ever.

        Raises:
            CheckpointError: as ``wait`` does, or the other ranks' copies have not come.
        """
        thread = self._thread
        if thread is not None:
            self._own_part.wait()
            thread.join(_FAREWELL)
            if thread.is_alive():
                raise CheckpointError(
                    "the checkpoint that was being copied is given up: another rank's copy is missing"
                )
        self.wait()

    def close(self) -> None:
        """Removes the folder, and its parent once that is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another rank of the node still has its folder there
            self.folder.parent.rmdir()
        if self.group is not None and self._thread is None:
            torch.distributed.destroy_process_group(self.group)
            self.group = None

    def _run(self, copy: Callable[[], None]) -> None:
        started = time.monotonic()
        failure: BaseException | None = None
        try:
            copy()
            self.slowest = max(self.slowest, time.monotonic() - started)
        except Exception as error:
            failure = error
        while True:
            with self._lock:
                if failure is not None or not self._behind:
                    self._behind.clear()
                    self._failure, self._thread, self.target = failure, None, None
                    self._own_part.set()
                    return
                action = self._behind.pop(0)
            try:
                action()
            except Exception as error:
                failure = error


def node_folder(local_dir: str, target: Path, rank: int) -> Path:
    """A rank's folder below ``local_dir`` for the checkpoints of ``target``: of another run there is another.

    ``$NAME`` and ``~`` are replaced by what they stand for on this node, where the job has begun.

    Raises:
        ValueError: a variable that is not set.
    """
    root = os.path.expandvars(os.path.expanduser(local_dir))
    if "$" in root:
        raise ValueError(f"checkpoint.local_dir {local_dir}: a variable in it is not set on this node")
    name = hashlib.sha256(str(target.resolve()).encode()).hexdigest()[:16]
    return Path(root).resolve() / f"ptl-{name}" / f"rank{rank}"


def copy_durably(source: Path, target: Path) -> None:
    """Copies all files of a folder into another, which may hold other ranks' files; each is on the disk at the end."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        there = target / file.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, there)
        with open(there, "rb+") as stream:
            os.fsync(stream.fileno())
