"""Processes that begin with everything imported: forks of one that has done nothing else.

A fresh process spends most of a small test's time on the imports of torch, Lightning and transformers. ``Forks`` keeps
one process of that kind and has it fork; each fork is a process of its own, in a session of its own, with the
environment that it is given. All forks of one ``Forks`` share the seed of Python's hashes, as fresh processes do not:
give ranks that must not depend on the order of a set different ones.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = ("torch", "lightning.pytorch", "transformers", "peft", "deepspeed", "torchmetrics", "ptl.trainer_cli")


class Forks:
    """Starts forks and hears how they end."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._codes: dict[int, int] = {}
        self._pids: list[int] = []
        self._rest = b""
        atexit.register(self.close)

    def start(self, target: str, environment: Mapping[str, str], output: Path) -> Fork:
        """Forks a process that calls ``"package.module:function"`` or runs a script, and writes to ``output``."""
        assert self._server.stdin is not None
        job = {"target": target, "environment": dict(environment), "output": str(output)}
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self._server.stdin.flush()
        while not self._pids:
            self._hear(None)
        return Fork(self, self._pids.pop())

    def code(self, pid: int) -> int | None:
        """The exit code of a fork, negative for a signal; None while it runs."""
        self._hear(0)
        return self._codes.get(pid)

    def close(self) -> None:
        """Ends the process that forks; the forks go on."""
        assert self._server.stdin is not None
        with contextlib.suppress(OSError):
            self._server.stdin.close()
        self._server.kill()
        self._server.wait()

    def _hear(self, seconds: float | None) -> None:
        assert self._server.stdout is not None
        stream = self._server.stdout.fileno()
        while select.select([stream], [], [], seconds)[0]:
            data = os.read(stream, 65536)
            if not data:
                raise RuntimeError(f"the process that forks has ended with code {self._server.wait()}")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                pid, code = json.loads(line)
                if code is None:
                    self._pids.append(pid)
                else:
                    self._codes[pid] = code
            seconds = 0


class Fork:
    """A process that ``Forks`` has started; of ``subprocess.Popen``'s methods those that ``ranks`` needs."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks, self.pid = forks, pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._forks.code(self.pid)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            select.select([], [], [], 0.02)
        return code


def main() -> None:
    """The process that forks: a job a line on its input, ``[pid, null]`` and ``[pid, code]`` on its output."""
    said = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that a collection in a fork does not copy every page
    rest = b""
    while True:
        if select.select([0], [], [], 0.05)[0]:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    _run(json.loads(line))
                os.write(said, json.dumps([pid, None]).encode() + b"\n")
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                os.write(said, json.dumps([ended[0], os.waitstatus_to_exitcode(ended[1])]).encode() + b"\n")


def _run(job: dict[str, Any]) -> None:
    """The life of a fork; ends as a process of its own would, with what ``atexit`` has been given."""
    code = 1
    try:
        os.setsid()
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, stream in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, stream)
        os.environ.clear()
        os.environ.update(job["environment"])
        faulthandler.enable()
        target = job["target"]
        sys.argv = [target]
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            module, _, function = target.partition(":")
            getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
