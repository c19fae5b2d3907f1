"""System calls that Python has no function for.

Every argument goes through a 64-bit word: a plain Python integer would be cut to 32 bits by ctypes, and a pointer
that was cut makes ``prctl`` install nothing without saying so.
"""

from __future__ import annotations

import ctypes
import os

MACHINES = {"x86_64": 0, "aarch64": 1}
"""Processors whose system call numbers are known here, and their column in the tables of numbers."""

PRCTL, CAPSET = (157, 167), (126, 91)
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_NO_NEW_PRIVILEGES = 1, 4, 38
CAPABILITY_VERSION = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def column() -> int:
    """This processor's column in the tables of numbers. Raises ``OSError`` on a processor that is not in them."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"the sandbox knows the system calls of {' and '.join(MACHINES)}, not of {machine}")
    return MACHINES[machine]


def call(number: int, *arguments: int) -> int:
    """One system call with integers and addresses. Raises ``OSError`` where it fails."""
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def control_process(option: int, value: int) -> None:
    """``prctl`` with one value. Raises ``OSError`` where it fails."""
    call(PRCTL[column()], option, value, 0, 0, 0)


def drop_capabilities() -> None:
    """Gives up every capability, so that user 0 is a user like any other. Raises ``OSError`` where it fails."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    call(CAPSET[column()], ctypes.addressof(header), ctypes.addressof(none))
