"""Starts real rank processes for a test, waits for them with a time limit and collects their results.

A test names a function by ``"package.module:function"``. Each rank imports it, calls it with the given keyword
arguments and writes what it returns as JSON::

    results = run_ranks("tests.strategies.scenarios:losses", world_size=2, args={"stage": 3}, timeout=120)
    assert results[0]["loss"] == results[1]["loss"]

The ranks see the variables that torchrun sets, so Lightning and DeepSpeed join them over gloo on the loopback address.
They are forks of processes that have imported everything (``tests.forks``): one of those for the even ranks and one for
the odd ones, so that two ranks have different hashes, as on a cluster.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forks

ROOT = Path(__file__).resolve().parent.parent
_WHERE = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
EXTENSIONS = Path(tempfile.gettempdir()) / f"ptl-torch-extensions-{os.getuid()}-{_WHERE}"
"""Where DeepSpeed keeps what it compiles for this environment, so that only the first start pays for it."""
COMPILE_SECONDS = 900.0
"""A compilation takes minutes on a busy machine, never so many."""
TAIL = 6000
"""Characters of each rank's output shown when a start fails."""
PATIENCE = 3.0
"""How many times as long a start may take as on a quiet machine."""
GRACE = 10.0
"""Seconds that the other ranks may go on after one has failed; they usually fail too and say more."""


class RanksFailedError(RuntimeError):
    """A rank failed or the time was up; the message holds the end of every rank's output."""


@dataclass
class _Rank:
    index: int
    process: forks.Fork
    output: Path
    result: Path

    def report(self) -> str:
        text = self.output.read_text(errors="replace")
        code = self.process.returncode
        return f"----- rank {self.index} (exit code {code}), end of its output -----\n{text[-TAIL:]}"


def rank() -> int:
    """This process's rank; ``RANK`` itself is gone once a Lightning trainer has been torn down."""
    return int(os.environ["PTL_TEST_RANK"])


def world_size() -> int:
    """The number of ranks that this process was started with."""
    return int(os.environ["PTL_TEST_WORLD_SIZE"])


def free_port() -> int:
    """A TCP port of the loopback address that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def compile_extensions() -> None:
    """Compiles what DeepSpeed loads on a CPU, once for an environment and outside every test's time limit.

    Raises:
        CalledProcessError: the compilation failed; the compiler's words are on stderr.
        TimeoutExpired: it took longer than ``COMPILE_SECONDS``.
    """
    done = EXTENSIONS / "complete"
    if done.exists():
        return
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    with (EXTENSIONS / "compiling").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return
        command = (
            "from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder;"
            "from ptl.strategies.extensions import load_extension;"
            "[load_extension(builder()) for builder in (ShareMemCommBuilder, CPUAdamBuilder)]"
        )
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(EXTENSIONS), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=env, timeout=COMPILE_SECONDS, check=True)
        done.touch()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The caller's environment with what a CPU rank needs: rendezvous, gloo, one thread, no network."""
    compile_extensions()
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **{name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},  # a process of the caller's
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": python_path,
        # One ninja for all: another version takes what this one has compiled for stale.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def start_deepspeed() -> None:
    """DeepSpeed's process group; its compiled part is loaded under the lock that all processes share."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from ptl.strategies.extensions import load_extension

    load_extension(ShareMemCommBuilder())
    deepspeed.init_distributed("gloo", verbose=False)


def run_ranks(
    target: str | Path,
    world_size: int,
    args: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Runs ``target`` on every rank and returns what each returned, in rank order.

    Args:
        target: ``"package.module:function"``, or the path of a script that reads its arguments as JSON from
            ``PTL_TEST_ARGS`` and writes its result as JSON to the file that ``PTL_TEST_RESULT`` names.
        world_size: number of processes.
        args: keyword arguments of the function; JSON values.
        timeout: seconds that the whole start takes at most on a quiet machine.
        env: variables set on top of ``rank_environment``; a value may hold ``{rank}``.

    Raises:
        RanksFailedError: a rank ended with a code other than 0, gave no result, or the time was up. The ranks and what
            they started are ended before, and each rank's last output and, after a time-out, its stack are in the
            message.
    """
    with tempfile.TemporaryDirectory(prefix="ptl-ranks-") as name:
        ranks = _start(target, world_size, dict(args or {}), Path(name), dict(env or {}))
        try:
            problem = _wait(ranks, PATIENCE * timeout)
        finally:
            _end(ranks)
        missing = [rank.index for rank in ranks if not rank.result.exists()]
        if problem is None and missing:
            problem = f"ranks {missing} ended well but wrote no result"
        if problem is not None:
            reports = "\n".join(rank.report() for rank in ranks)
            raise RanksFailedError(f"{target} on {world_size} ranks: {problem}\n{reports}")
        return [json.loads(rank.result.read_text()) for rank in ranks]


def _start(target: str | Path, world_size: int, args: dict, folder: Path, env: dict[str, str]) -> list[_Rank]:
    port = free_port()
    ranks = []
    for index in range(world_size):
        output, result = folder / f"rank{index}.log", folder / f"rank{index}.json"
        output.touch()
        environment = {
            **rank_environment(index, world_size, port),
            **{key: value.replace("{rank}", str(index)) for key, value in env.items()},
            "PTL_TEST_RANK": str(index),
            "PTL_TEST_WORLD_SIZE": str(world_size),
            "PTL_TEST_TARGET": str(target),
            "PTL_TEST_ARGS": json.dumps(args),
            "PTL_TEST_RESULT": str(result),
        }
        what = str(target) if str(target).endswith(".py") else "tests.ranks:main"
        ranks.append(_Rank(index, forks.start(what, environment, output, parity=index), output, result))
    return ranks


def _wait(ranks: list[_Rank], timeout: float) -> str | None:
    """Waits until all ranks have ended; returns what went wrong, or None."""
    deadline = time.monotonic() + timeout
    first_failure: str | None = None
    while None in [rank.process.poll() for rank in ranks]:
        if first_failure is None:
            failed = [rank.index for rank in ranks if rank.process.returncode not in (None, 0)]
            if failed:
                first_failure = f"ranks {failed} failed first"
                deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            running = [rank.index for rank in ranks if rank.process.poll() is None]
            return first_failure or f"time is up after {timeout:.0f} s, ranks {running} still ran"
        time.sleep(0.05)
    failed = [rank.index for rank in ranks if rank.process.returncode != 0]
    return first_failure or (f"ranks {failed} failed" if failed else None)


def _end(ranks: list[_Rank]) -> None:
    """Ends the ranks that still run, first asking for their stacks, then with all that they started."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    for rank in running:
        rank.process.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
    deadline = time.monotonic() + 3.0
    while running and time.monotonic() < deadline and None in [rank.process.poll() for rank in running]:
        time.sleep(0.05)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)  # the rank leads its own session: nothing else is in it
        rank.process.send_signal(signal.SIGKILL)  # where it has not come to have a session yet
        rank.process.wait()


def main() -> None:
    """Entry point of a rank process."""
    module, _, function = os.environ["PTL_TEST_TARGET"].partition(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(os.environ["PTL_TEST_ARGS"]))
    path = Path(os.environ["PTL_TEST_RESULT"])
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result if result is not None else {}))
    partial.rename(path)
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
