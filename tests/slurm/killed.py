"""A rank of a job that is killed again and again while it saves: SIGKILL at random moments of a checkpoint.

The process imports everything once and forks each attempt, so that twenty of them take a minute. Arguments: a JSON file
with ``run``, ``arguments`` of ``ptl fit``, ``trials`` and ``seed``; the results go to ``killed.json`` beside it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = 240.0
"""Longest that an attempt may take until it saves."""


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    import ptl.trainer_cli  # noqa: F401, the forked attempts find it loaded

    rank, port = int(os.environ["SLURM_PROCID"]), int(os.environ["MASTER_PORT"])
    rng, seen = random.Random(plan["seed"]), []
    folder = Path(plan["run"]) / "checkpoints"
    for trial in range(plan["trials"]):
        flag = Path(sys.argv[1]).with_name(f"trial-{trial}")
        child = _attempt(plan["arguments"], port + 1 + trial, Path(sys.argv[1]).with_name(f"trial-{trial}.{rank}.log"))
        if rank == 0:
            _await_saving(folder, child)
            time.sleep(rng.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            flag.touch()
        else:
            while not flag.exists():
                time.sleep(0.02)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            flag.with_suffix(".gone").touch()
        if rank == 0:
            while not flag.with_suffix(".gone").exists():
                time.sleep(0.02)
            seen.append(_state(folder, Path(plan["run"])))
    if rank == 0:
        Path(sys.argv[1]).with_name("killed.json").write_text(json.dumps(seen))


def _attempt(arguments: list[str], port: int, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ["MASTER_PORT"] = str(port)
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from ptl.trainer_cli import run

        os._exit(run(["fit", *arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def _await_saving(folder: Path, child: int) -> None:
    """Until a checkpoint is being written under its hidden name."""
    begun, deadline = time.time(), time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if folder.is_dir() and any(_changed(path) > begun for path in folder.glob(".*")):
            return
        if os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("an attempt ended before it was killed")
        time.sleep(0.002)
    raise SystemExit(f"no attempt to save within {SECONDS:.0f} s")


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _state(folder: Path, run: Path) -> dict[str, Any]:
    """What a kill has left: the step of the newest whole checkpoint, and whether the kill hit a save."""
    from ptl.callbacks.saved import latest_checkpoint
    from ptl.strategies.checkpoints import read_record

    newest = latest_checkpoint(run)
    return {"step": read_record(newest).global_step if newest else 0, "hit": any(folder.glob(".*"))}


if __name__ == "__main__":
    main()
