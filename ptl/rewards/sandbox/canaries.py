"""Which way to lock programs in holds on this machine: found by trying to break out, not by what is installed."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
import tempfile
import threading
from pathlib import Path

from ptl.rewards.sandbox.backends import BACKENDS, Backend
from ptl.rewards.sandbox.results import Job, Limits, RunResult, SandboxError, SandboxUnavailableError
from ptl.rewards.sandbox.worker import Worker

PROGRAM = """
import os, socket, threading

def attempt(action):
    try:
        return "done: " + repr(action())[:300]
    except BaseException as refusal:
        return "refused: " + type(refusal).__name__

def square(x):
    return x * x

def read(path):
    return attempt(lambda: open(path).read())

def write(path):
    return attempt(lambda: open(path, "w").write("x"))

def environment():
    return sorted(os.environ)

def connect(port):
    return attempt(lambda: socket.create_connection(("127.0.0.1", port), 2))

def datagram():
    return attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).fileno())

def abstract(name):
    return attempt(lambda: socket.socket(socket.AF_UNIX).connect(chr(0) + name))

def fork():
    def once():
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        return os.waitpid(pid, 0)
    return attempt(once)

def thread():
    return attempt(threading.Thread(target=int).start)

def signal(pid):
    return attempt(lambda: os.kill(pid, 0))

def execute(path):
    return attempt(lambda: os.execv(path, [path, "-c", "pass"]))
"""
LIMITS = Limits(wall=20.0, cpu=10)
_choice: dict[str, Backend] = {}
_choosing = threading.Lock()


def choose() -> Backend:
    """The strongest way that held, tried once a process. Raises ``SandboxUnavailableError`` where none did."""
    with _choosing:
        if "chosen" not in _choice:
            _choice["chosen"] = _first_that_holds()
        return _choice["chosen"]


def _first_that_holds() -> Backend:
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailableError(f"programs written by a model run on Linux only, not on {sys.platform}")
    reasons = []
    for backend in BACKENDS:
        try:
            breaches = verify(backend)
        except SandboxError as failure:
            breaches = [str(failure)]
        if not breaches:
            return backend
        reasons.append(f"{backend.name}: {'; '.join(breaches)}")
    raise SandboxUnavailableError("no sandbox holds on this machine, so no program is run. " + " | ".join(reasons))


def verify(backend: Backend) -> list[str]:
    """What a program could do under this backend that it must not; an empty list where it holds.

    Raises ``SandboxError`` where the backend does not even start.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ptl-canary-")))
        folder.chmod(0o777)  # what keeps it safe must be the sandbox, not the rights of the folder
        secret, outside = folder / "secret", folder / "outside"
        secret.write_text(secrets.token_hex(16))
        secret.chmod(0o644)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        local = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"ptl-canary-{secrets.token_hex(8)}"
        local.bind(f"\0{name}")
        local.listen()
        refused = [
            f"read({str(secret)!r})",
            f"read('/proc/{os.getpid()}/environ')",
            "read('/proc/self/environ')",
            "read('/etc/passwd')",
            f"write({str(outside)!r})",
            f"connect({listener.getsockname()[1]})",
            "datagram()",
            f"abstract({name!r})",
            "fork()",
            "thread()",
            f"signal({os.getpid()})",
            "signal(os.getppid())",
            f"execute({sys.executable!r})",
        ]
        worker = Worker(backend)
        stack.callback(worker.close)
        result = worker.run(Job(PROGRAM, ("square(12)", "environment()", *refused), LIMITS))
        breaches = _breaches(result, refused)
        if outside.exists():
            breaches.append("a file was written outside")
        with contextlib.suppress(BlockingIOError):
            listener.accept()[0].close()
            breaches.append("a loopback listener was reached")
        return breaches


def _breaches(result: RunResult, refused: list[str]) -> list[str]:
    honest, environment, *attempts = result.calls
    found = []
    if honest.value != 144:
        found.append(f"an honest program does not run: {honest.error}")
    elif environment.value != []:
        found.append(f"the environment is seen: {environment.error or environment.value}")
    for what, attempt in zip(refused, attempts):
        if type(attempt.value) is not str or not attempt.value.startswith("refused: "):
            found.append(f"{what} gave {attempt.error or str(attempt.value)[:40]}")
    return found
