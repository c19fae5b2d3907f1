"""Processes that begin with everything imported: forks of one that has done nothing else.

A fresh process spends most of a small test's time on the imports of torch, Lightning and transformers. Here a process
that has made them forks; each fork is a process of its own, in a session of its own, with the environment, the folder
and the streams that it is given. There are two processes to fork from, for all of pytest's workers together, with
different seeds of Python's hashes: give ranks that must not depend on the order of a set different ones (``parity``).
They are started when first asked, and end with the process that ``PTL_TEST_FORKS`` names.

A test of what a fresh process imports, or of a variable that is read at an import, needs a real one.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import ptl

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "PTL_TEST_FORKS"
IMPORTS = (
    "torch",
    "lightning.pytorch",
    "transformers",
    "peft",
    "deepspeed",
    "torchmetrics",
    "transformers.models.llama.modeling_llama",
    "omegaconf",
    "pytest",
    "tests.callbacks.parts",
    "tests.objectives.rl",
    "tests.strategies.scenarios",
)
"""And all modules of ``ptl``."""
_LARGEST = 1 << 20
"""Bytes of a job at most, its environment included; the kernel may allow less."""


def share() -> None:
    """Has all processes that this one starts use the same two to fork from; they end with this one."""
    if FOLDER in os.environ:
        return
    folder = tempfile.mkdtemp(prefix=f"ptl-forks-{os.getpid()}-")
    os.environ[FOLDER] = folder
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)


class Fork:
    """A process started here; of ``subprocess.Popen``'s methods those that tests need."""

    def __init__(self, forks: _Forks, pid: int) -> None:
        self._forks, self.pid = forks, pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._forks.code(self.pid)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end.

        Raises:
            TimeoutExpired: it still ran after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout or 0.0)
            time.sleep(0.02)
        return code


class Program(Fork):
    """A Python program in a fork, with its output in files that can be read at any time."""

    def __init__(self, fork: Fork, words: Sequence[str], stdout: IO[bytes], stderr: IO[bytes]) -> None:
        super().__init__(fork._forks, fork.pid)
        self._words, self._stdout, self._stderr = list(words), stdout, stderr

    def said(self) -> str:
        """What it has written to its standard output so far."""
        return _text(self._stdout)

    def complained(self) -> str:
        """What it has written to its standard error so far."""
        return _text(self._stderr)

    def finish(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Waits for the end, and kills it and raises ``TimeoutExpired`` after ``timeout`` seconds."""
        try:
            code = self.wait(timeout)
        except BaseException:
            self.kill()
            raise
        return subprocess.CompletedProcess(self._words, code, self.said(), self.complained())


def start(target: str, environment: Mapping[str, str], output: Path, parity: int = 0) -> Fork:
    """A fork that calls ``"package.module:function"`` or runs a script, and writes to ``output``."""
    with Path(os.devnull).open("rb") as nothing, output.open("ab") as out:
        return _forks(parity).start({"target": target}, environment, Path.cwd(), (nothing, out, out))


def begin(
    words: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    parity: int = 1,
) -> Program:
    """A Python program in a fork.

    Args:
        words: what would follow ``python``: ``-c`` and code, ``-m`` and a module, or a script; then its arguments.
        env: its environment, this process's own if None.
        cwd: its folder, this process's own if None.
        parity: which of the two processes to fork from.
    """
    words = [str(word) for word in words]
    stdout, stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
    environment = os.environ if env is None else env
    with Path(os.devnull).open("rb") as nothing:
        fork = _forks(parity).start({"words": words}, environment, cwd or Path.cwd(), (nothing, stdout, stderr))
    return Program(fork, words, stdout, stderr)


def run(
    words: Sequence[str | Path],
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120.0,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a Python program in a fork to its end; the arguments are those of ``begin``.

    Raises:
        TimeoutExpired: it still ran after ``timeout`` seconds, and has been killed.
        AssertionError: with ``check``, it ended with a code other than 0; the message holds the end of its output.
    """
    done = begin(words, env, cwd).finish(timeout)
    assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def _text(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


# ---- this side ----


class _Forks:
    """A connection to a process that forks."""

    def __init__(self, folder: Path, name: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
        self._codes: dict[int, int] = {}
        self._pids: list[int] = []
        path = folder / name
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                # Bound and listened to here, so that whoever comes waits in the queue and not for a file.
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
                    listening.bind(str(path))
                    listening.listen(64)
                    owner = folder.name.split("-")[2]
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.forks", str(listening.fileno()), owner],
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        pass_fds=[listening.fileno()],
                        start_new_session=True,
                    )
        self._socket.connect(str(path))

    def start(
        self, job: dict[str, Any], environment: Mapping[str, str], cwd: Path, streams: Sequence[IO[bytes]]
    ) -> Fork:
        job = {**job, "environment": dict(environment), "cwd": str(cwd)}
        descriptors = array.array("i", [stream.fileno() for stream in streams])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
        self._socket.sendmsg([json.dumps(job).encode()], ancillary)
        while not self._pids:
            self._hear(None)
        return Fork(self, self._pids.pop())

    def code(self, pid: int) -> int | None:
        self._hear(0)
        return self._codes.get(pid)

    def _hear(self, seconds: float | None) -> None:
        while select.select([self._socket], [], [], seconds)[0]:
            data = self._socket.recv(4096)
            if not data:
                raise RuntimeError("the process that forks has ended")
            pid, code = json.loads(data)
            if code is None:
                self._pids.append(pid)
                self._codes.pop(pid, None)  # of an earlier process with the same number
            else:
                self._codes[pid] = code
            seconds = 0


@cache
def _forks(parity: int) -> _Forks:
    share()
    return _Forks(Path(os.environ[FOLDER]), f"forks-{parity % 2}")


# ---- the process that forks ----


def main() -> None:
    """A message a job, with its three streams; ``[pid, null]`` and ``[pid, code]`` are the answers to it."""
    listening, owner = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    own = (module.name for module in pkgutil.walk_packages(ptl.__path__, "ptl.") if "__main__" not in module.name)
    for name in (*IMPORTS, *own):
        with contextlib.suppress(ImportError):  # of what is not installed here
            importlib.import_module(name)
    _load_extensions()
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False  # torch's libraries, say: at the end of a fork they are taken apart for nothing
    gc.collect()
    gc.freeze()  # so that a collection in a fork does not copy every page
    clients: list[socket.socket] = []
    children: dict[int, socket.socket] = {}
    while lives(owner):
        for ready in select.select([listening, *clients], [], [], 0.05 if children else 1.0)[0]:
            if ready is listening:
                clients.append(listening.accept()[0])
                continue
            data, descriptors, _, _ = socket.recv_fds(ready, _LARGEST, 3)
            if not data:
                clients.remove(ready)
                ready.close()
                continue
            pid = os.fork()
            if pid == 0:
                for other in (listening, *clients):
                    other.close()
                _live(json.loads(data), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            children[pid] = ready
            _tell(ready, pid, None)
        while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _tell(children.pop(ended[0]), ended[0], os.waitstatus_to_exitcode(ended[1]))


def _load_extensions() -> None:
    """What DeepSpeed compiles for a CPU, where that has been done: to load it asks ninja and the CPU for a second."""
    from tests.ranks import EXTENSIONS

    if not (EXTENSIONS / "complete").exists():
        return
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder

    from ptl.strategies.extensions import load_extension

    for builder in (ShareMemCommBuilder(), CPUAdamBuilder()):
        load_extension(builder)


def lives(pid: int) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _tell(client: socket.socket, pid: int, code: int | None) -> None:
    with contextlib.suppress(OSError):  # it has gone
        client.send(json.dumps([pid, code]).encode())


def _live(job: dict[str, Any], descriptors: Sequence[int]) -> None:
    """The life of a fork; ends as a process of its own would, with what ``atexit`` has been given."""
    code, interrupted = 1, False
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        for stream, descriptor in enumerate(descriptors):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        faulthandler.enable()
        if "words" in job:
            _program(job["words"])
        else:
            _call(job["target"])
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        interrupted = True
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)


def _call(target: str) -> None:
    sys.argv = [target]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)()


def _program(words: list[str]) -> None:
    """As ``python WORDS`` would."""
    first, *rest = words
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [os.getcwd() if first in ("-c", "-m") else str(Path(first).parent), *paths]
    if first == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        name, *arguments = rest
        sys.argv = [name, *arguments]
        sys.modules.pop(name, None)  # which runpy would warn of
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
