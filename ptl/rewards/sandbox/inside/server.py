"""The process that waits inside the sandbox and makes a fresh process for each program.

It has seen no program and no result: it passes on two descriptors, one to read the request from and one to write
results to, to a process that locks itself before it reads. So nothing of one program is in the memory of the next.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import stat
import time

from . import kernel, landlock, program, seccomp

CONTROL, REQUEST, RESULTS = 0, 3, 4
HIGH, EVERY = 100, 4096
"""Descriptors that are kept while others are put in their places, and a number above all of them."""
NOBODY = 65534
LOCKED, FAILED = b"locked\n", b"failed "
"""First line of the results, written before the program runs: whether the process could lock itself."""

PRELOADED = [
    "abc",
    "array",
    "ast",
    "asyncio",
    "base64",
    "bisect",
    "bz2",
    "calendar",
    "cmath",
    "collections",
    "contextlib",
    "copy",
    "csv",
    "ctypes",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "inspect",
    "io",
    "itertools",
    "json",
    "keyword",
    "locale",
    "lzma",
    "math",
    "numbers",
    "operator",
    "pickle",
    "pprint",
    "queue",
    "random",
    "re",
    "secrets",
    "sqlite3",
    "statistics",
    "string",
    "struct",
    "tempfile",
    "textwrap",
    "threading",
    "time",
    "timeit",
    "traceback",
    "types",
    "typing",
    "unicodedata",
    "unittest",
    "uuid",
    "warnings",
    "xml.etree.ElementTree",
    "zlib",
]
"""Imported once, for speed, and because their shared libraries cannot be read later."""


class Lock:
    """Everything a process needs to lock itself; made once, used after each fork."""

    def __init__(self) -> None:
        kernel.control_process(kernel.SET_DUMPABLE, 0)
        rules = landlock.ruleset(landlock.standard_library())
        self.rules = fcntl.fcntl(rules, fcntl.F_DUPFD_CLOEXEC, HIGH)
        os.close(rules)
        self.filter = seccomp.build()
        self.nobody = os.geteuid() == 0 and _everyone_may_read(os.__file__)

    def close_on(self, limits: dict, parent: int) -> None:
        """Locks the calling process, a child of ``parent``. Raises ``OSError`` where a lock does not hold."""
        cpu = int(limits["cpu"])
        for what, most in (
            (resource.RLIMIT_AS, (limits["memory"],) * 2),
            (resource.RLIMIT_CPU, (cpu, cpu + 1)),  # SIGXCPU first, SIGKILL a second later
            (resource.RLIMIT_FSIZE, (0, 0)),
            (resource.RLIMIT_NOFILE, (64, 64)),
            (resource.RLIMIT_NPROC, (0, 0)),
            (resource.RLIMIT_CORE, (0, 0)),
            (resource.RLIMIT_MSGQUEUE, (0, 0)),
        ):
            hard = resource.getrlimit(what)[1]  # one that is lower already stays
            resource.setrlimit(
                what, most if hard == resource.RLIM_INFINITY else (min(most[0], hard), min(most[1], hard))
            )
        if self.nobody:
            _become_nobody()
        kernel.drop_capabilities()
        kernel.control_process(kernel.SET_DUMPABLE, 0)
        kernel.control_process(kernel.SET_DEATH_SIGNAL, signal.SIGKILL)  # here, since another user's process loses it
        if os.getppid() != parent:
            raise OSError("the process that started this one is gone")
        kernel.control_process(kernel.SET_NO_NEW_PRIVILEGES, 1)
        landlock.restrict(self.rules)
        os.close(self.rules)
        seccomp.install(self.filter)


def main() -> None:
    """Serves until the other end of the control socket closes."""
    control = socket.socket(fileno=CONTROL)
    try:
        os.closerange(REQUEST, EVERY)
        os.environ.clear()
        for name in PRELOADED:
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # this Python was built without it
        lock = Lock()
    except Exception as failure:
        control.send(json.dumps({"error": f"{type(failure).__name__}: {failure}"}).encode())
        return
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"landlock": landlock.version(), "pid": os.getpid()}).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, 2)
        if not message:
            return
        if len(descriptors) != 2:
            continue  # "kill", for a program that has ended by itself
        limits = json.loads(message)
        pid = _start(lock, limits, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        report = _watch(control, pid, limits["wall"])
        if report is None:
            return
        control.send(json.dumps(report).encode())


def _start(lock: Lock, limits: dict, request: int, results: int) -> int:
    """Forks; the new process locks itself, says so, and runs its program."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, HIGH) for descriptor in (request, results)]
        os.dup2(high[0], REQUEST)
        os.dup2(high[1], RESULTS)
        os.dup2(1, 0)  # standard output is /dev/null
        os.dup2(1, 2)
        os.closerange(RESULTS + 1, lock.rules)
        os.closerange(lock.rules + 1, EVERY)
        lock.close_on(limits, parent)
        os.write(RESULTS, LOCKED)
    except BaseException as failure:
        os.write(RESULTS, FAILED + f"{type(failure).__name__}: {failure}".encode("ascii", "replace") + b"\n")
        os._exit(1)
    try:
        program.run(REQUEST, RESULTS)
    finally:
        os._exit(0)  # nothing that the program left for the end of the process is run


def _watch(control: socket.socket, pid: int, wall: float) -> dict | None:
    """Waits for a process and kills it at its time limit or on request; None when nobody listens any more."""
    handle = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(control, select.POLLIN)
    begun, late, alone = time.monotonic(), False, False
    while True:
        left = begun + wall - time.monotonic()
        ready = {descriptor for descriptor, _ in poll.poll(max(0.0, left) * 1000)}
        if handle in ready:
            break
        late = not ready
        alone = control.fileno() in ready and not control.recv(64)
        os.kill(pid, signal.SIGKILL)
        break
    _, status, used = os.wait4(pid, 0)
    os.close(handle)
    if alone:
        return None
    code = os.waitstatus_to_exitcode(status)
    return {"exit": code, "late": late, "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}


def _become_nobody() -> None:
    """Another user, where this one may change: not in a namespace that has one user only."""
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return


def _everyone_may_read(path: str) -> bool:
    """Whether a user without rights can open a file: it is readable, and each folder above it can be entered."""
    path = os.path.realpath(path)
    if not os.stat(path).st_mode & stat.S_IROTH:
        return False
    while path != "/":
        path = os.path.dirname(path)
        if not os.stat(path).st_mode & stat.S_IXOTH:
            return False
    return True
