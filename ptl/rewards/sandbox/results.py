"""What a caller of the sandbox gives and gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Status = Literal["ok", "error", "timeout", "output", "killed", "exited"]


class SandboxError(RuntimeError):
    """The sandbox itself failed; nothing is known about the program."""


class SandboxUnavailableError(SandboxError):
    """No way to lock a program in was found on this machine; the message says what each one lacked."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. It is always one process with one thread that can write no file.

    Attributes:
        wall: seconds from its start, all calls together.
        cpu: whole seconds of processor time.
        memory: bytes of address space, the interpreter's own (about 40 MB) included.
        output: bytes of all results, as they travel.
    """

    wall: float = 10.0
    cpu: int = 5
    memory: int = 512 << 20
    output: int = 256 << 10

    def __post_init__(self) -> None:
        if self.wall <= 0 or self.cpu < 1 or self.output < 1:
            raise ValueError(f"{self}: expected wall > 0, cpu >= 1 and output >= 1")
        if self.memory < 64 << 20:
            raise ValueError(
                f"memory {self.memory}: expected at least {64 << 20} bytes, below which Python does not run"
            )


class Job(NamedTuple):
    """A program, and expressions that are evaluated in it, in order."""

    code: str
    calls: tuple[str, ...] = ()
    limits: Limits = Limits()


@dataclass(frozen=True)
class CallResult:
    """What one call gave: a ``value`` of exact builtin types, or what went wrong in ``error``."""

    value: object = None
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether there is a value (which may be None)."""
        return self.error is None


@dataclass(frozen=True)
class RunResult:
    """What became of a program.

    Attributes:
        status: ``ok`` (it ran to its end; single calls may have errors), ``error`` (the code raised before any call),
            ``timeout`` (wall or processor time), ``output`` (too many bytes of results), ``killed`` (by a signal, as a
            crash is), ``exited`` (it ended itself).
        calls: one result for each call, in order; a call that was not reached has an error.
        error: a sentence where the status is not ``ok``.
        seconds: processor time.
        peak: bytes of resident memory.
    """

    status: Status
    calls: tuple[CallResult, ...]
    error: str | None
    seconds: float
    peak: int
