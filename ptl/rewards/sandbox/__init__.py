"""A sandbox for programs that a model wrote. It needs Linux and nothing beyond the standard library;
``docs/sandbox.md``.

``run_code(code, calls)`` runs a program and evaluates expressions in it. What is expected of them stays on this side:
the caller compares, the program never sees it.
"""

from ptl.rewards.sandbox.asserts import Check, ConversionError, UnitTests, convert
from ptl.rewards.sandbox.pool import Sandbox, run_code, shared
from ptl.rewards.sandbox.results import CallResult, Job, Limits, RunResult, SandboxError, SandboxUnavailableError

__all__ = [
    "CallResult",
    "Check",
    "ConversionError",
    "Job",
    "Limits",
    "RunResult",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailableError",
    "UnitTests",
    "convert",
    "run_code",
    "shared",
]
