"""One process inside the sandbox, as the trusted side sees it: programs go in one after the other, bytes come out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence

from ptl.rewards.sandbox import values
from ptl.rewards.sandbox.backends import Backend
from ptl.rewards.sandbox.results import CallResult, Job, Limits, RunResult, SandboxError, Status

START_SECONDS = 30.0
GRACE = 5.0
"""Seconds beyond a program's wall limit after which the process inside is given up and killed with all it started."""


class Worker:
    """A running process inside. Raises ``SandboxError`` where it does not start."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        try:
            command = backend.command()
        except FileNotFoundError as missing:
            raise SandboxError(str(missing)) from None
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as the process)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self.errors,
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as failure:
                self.control.close()
                raise SandboxError(f"{backend.name}: {failure}") from None
        try:
            hello = self._receive(START_SECONDS)
            if "error" in hello:
                raise SandboxError(hello["error"])
        except SandboxError as failure:
            self.close()
            raise SandboxError(f"{backend.name}: {failure}") from None

    def run(self, job: Job) -> RunResult:
        """Runs one program. Raises ``SandboxError`` where the sandbox failed; this worker is then closed."""
        try:
            data, overflow, report = self._exchange(job)
        except (SandboxError, OSError, ValueError) as failure:  # ValueError: somebody closed it meanwhile
            self.close()
            raise SandboxError(f"{self.backend.name}: {failure}") from None
        first, *lines = data.split(b"\n")
        if first != b"locked":
            self.close()
            raise SandboxError(
                f"{self.backend.name}: a program could not be locked in: {first[:300].decode('ascii', 'replace')}"
            )
        return _result(job, lines[:-1], overflow, report)  # the last part has no newline: nothing, or torn

    def _exchange(self, job: Job) -> tuple[bytes, bool, dict]:
        """Sends a program; gives the bytes of its results, whether they were too many, and the report of its end."""
        request = os.memfd_create("request")
        results, theirs = os.pipe()
        try:
            with open(request, "wb", closefd=False) as file:
                file.write(json.dumps({"code": job.code, "calls": job.calls}).encode("ascii"))
            os.lseek(request, 0, os.SEEK_SET)
            limits = json.dumps({"wall": job.limits.wall, "cpu": job.limits.cpu, "memory": job.limits.memory})
            socket.send_fds(self.control, [limits.encode()], [request, theirs])
            os.close(theirs)
            theirs = -1
            return self._collect(results, job.limits)
        finally:
            for descriptor in (request, results, theirs):
                if descriptor >= 0:
                    os.close(descriptor)

    def _collect(self, results: int, limits: Limits) -> tuple[bytes, bool, dict]:
        deadline = time.monotonic() + limits.wall + GRACE
        parts, size, overflow = [], 0, False
        poll = select.poll()
        poll.register(results, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if not poll.poll(max(0.0, left) * 1000):
                raise SandboxError(f"no answer {GRACE:g} s after the time limit")
            part = os.read(results, 1 << 16)
            if not part:
                break  # the program's only process is gone
            parts.append(part)
            size += len(part)
            if size > limits.output:
                overflow = True
                self.control.send(b"kill")
                break
        report = self._receive(max(GRACE, deadline - time.monotonic()))
        return b"".join(parts)[: limits.output], overflow, report

    def _receive(self, seconds: float) -> dict:
        """A message of the process inside. Raises ``SandboxError`` at its end or when none comes in time."""
        poll = select.poll()  # select() refuses descriptors above 1023, which a trainer has
        poll.register(self.control, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise SandboxError(f"the process inside said nothing for {seconds:.0f} s")
        try:
            message = self.control.recv(1 << 16)
        except OSError:
            message = b""
        if not message:
            raise SandboxError(f"the process inside ended{self._last_words()}")
        return json.loads(message)

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.errors.seek(0)
        text = self.errors.read(1 << 16).decode("utf-8", "replace").strip()
        return f": {text.splitlines()[-1][:300]}" if text else ""

    def close(self) -> None:
        """Kills the process inside and all it started."""
        self.control.close()
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()


def _result(job: Job, lines: Sequence[bytes], overflow: bool, report: dict) -> RunResult:
    failure, found = values.read(lines, len(job.calls))
    status, error = _status(job, overflow, report, failure, len(found))
    missing = CallResult(error=f"no result: {error}")
    calls = tuple(found.get(index, missing) for index in range(len(job.calls)))
    return RunResult(status, calls, error, report["cpu"], report["peak"])


def _status(job: Job, overflow: bool, report: dict, failure: str | None, found: int) -> tuple[Status, str | None]:
    """How a program ended, by what the process inside saw; only then by what the program says of itself."""
    code, limits = report["exit"], job.limits
    if overflow:
        return "output", f"the results are larger than {limits.output} bytes"
    if report["late"]:
        return "timeout", f"it ran longer than {limits.wall:g} s"
    if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report["cpu"] >= limits.cpu):
        return "timeout", f"it used more than {limits.cpu} s of processor time"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return "killed", f"{name} ended it"
    if failure is not None:
        return "error", failure
    if code != 0 or found < len(job.calls):
        return "exited", f"it ended itself with code {code} after {found} of {len(job.calls)} calls"
    return "ok", None
