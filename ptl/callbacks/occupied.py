"""One run folder, one run: what keeps two commands from writing into it at the same time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

OCCUPIED_FILE = "run.lock"


def occupy(run_dir: str | os.PathLike[str]) -> IO[str] | None:
    """Takes a run folder for this process until the file that is returned is closed or the process has ended.

    It is a POSIX record lock: it ends with its process however that ends, is not inherited by loader processes, and
    holds between the nodes of a shared file system. Where the file system has no locks, or the folder cannot be
    written, nothing is taken and None returned: the run itself says what is wrong with the folder.

    Raises:
        ValueError: a process that runs has the folder.
    """
    path = Path(run_dir) / OCCUPIED_FILE
    job, restarts = (os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "RESTART_COUNT"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _taken(path)
        if file is None:
            holder = _holder(path)
            if not job or holder.get("job") != job or holder.get("restarts") == restarts:
                raise ValueError(
                    f"the run folder {run_dir} is in use by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'another node')}: wait for its end or pass another --run.dir (where that "
                    f"process is surely gone, delete {path})"
                )
            # SLURM starts a job again when its tasks have ended: a server may still keep the lock for a dead node.
            path.unlink(missing_ok=True)
            file = _taken(path)
    except OSError:
        return None
    if file is not None:
        file.truncate(0)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "job": job, "restarts": restarts}
        file.write(json.dumps(holder) + "\n")
        file.flush()
    return file


def _taken(path: Path) -> IO[str] | None:
    """The file, locked; None where another process has it.

    Raises:
        OSError: it cannot be opened, or the file system has no locks.
    """
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open(path, "a+", encoding="utf-8"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return None
            raise
        opened.pop_all()
        return file


def _holder(path: Path) -> dict[str, Any]:
    """Who has written into the file; empty where that is unknown."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
