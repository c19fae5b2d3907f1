"""The system calls that a program may make: a list of what is allowed, turned into a filter that the kernel runs.

No process, thread, signal, socket, write to a file or change of limits is on it, nor anything that Linux may add
later. What is not on the list fails with EPERM, so that the program gets an ordinary exception; what came after
``clone3`` fails with ENOSYS, since the C library tries the newer call first and then an older one.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from . import kernel

SECCOMP, SET_FILTER = (317, 277), 1
ARCHITECTURES = (0xC000003E, 0xC00000B7)
ALLOW, FAIL, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
NEWER = 435
"""Number of clone3; from 424 on a call has the same number on every processor."""

ALLOWED = {  # name: (x86_64, aarch64); None where the processor has no such call
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None),
    "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233),
    "dup": (32, 23), "dup2": (33, None), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None),
    "setitimer": (38, 103), "getpid": (39, 172), "recvfrom": (45, 207), "exit": (60, 93), "uname": (63, 160),
    "getcwd": (79, 17), "chdir": (80, 49), "readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "sigaltstack": (131, 132),
    "gettid": (186, 178), "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, None),
    "epoll_ctl": (233, 21), "openat": (257, 56), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59),
    "getrandom": (318, 278),
    "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436),
    "faccessat2": (439, 439), "epoll_pwait2": (441, 441),
}  # fmt: skip

LIMITED = {  # numbers, what each argument named must be, and the error where it is something else
    # F_SETOWN is missing: it makes the kernel send a signal to another process.
    "fcntl": ((72, 25), {1: (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)}, errno.EPERM),
    # Flags of a descriptor only. Python reads ENOTTY as "not a terminal" and goes on.
    "ioctl": ((16, 29), {1: (0x5421, 0x5450, 0x5451, 0x541B)}, errno.ENOTTY),
    # A pair of AF_UNIX sockets is asyncio's way to wake itself; it reaches nobody, as long as no address is given.
    "socketpair": ((53, 199), {0: (1,)}, errno.EPERM),
    "sendto": ((44, 206), {4: (0,)}, errno.EPERM),
    # To read one's own limits, not to change any.
    "prlimit64": ((302, 261), {0: (0,), 2: (0,)}, errno.EPERM),
}


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _limited(number: int, conditions: dict[int, tuple[int, ...]], error: int) -> list[bytes]:
    """Allows a call where each argument is one of its values; compares all 64 bits."""
    refuse = _step(RETURN, FAIL | error)
    body: list[bytes] = []
    for argument, values in conditions.items():
        low = 16 + 8 * argument
        body += [_step(LOAD, low + 4), _step(IF_EQUAL, 0, 1, 0), refuse, _step(LOAD, low)]
        body += [_step(IF_EQUAL, value, len(values) - i, 0) for i, value in enumerate(values)]
        body.append(refuse)
    body.append(_step(RETURN, ALLOW))
    return [_step(IF_EQUAL, number, 0, len(body)), *body]


def build() -> bytes:
    """The filter of this processor. Raises ``OSError`` on a processor whose numbers are not known."""
    column = kernel.column()
    steps = [_step(LOAD, 4), _step(IF_EQUAL, ARCHITECTURES[column], 1, 0), _step(RETURN, KILL_PROCESS), _step(LOAD, 0)]
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            steps += [_step(IF_EQUAL, number, 0, 1), _step(RETURN, ALLOW)]
    for numbers, conditions, error in LIMITED.values():
        steps += _limited(numbers[column], conditions, error)
    steps += [_step(IF_AT_LEAST, NEWER, 0, 1), _step(RETURN, FAIL | errno.ENOSYS), _step(RETURN, FAIL | errno.EPERM)]
    return b"".join(steps)


def install(steps: bytes) -> None:
    """Puts the calling process under a filter for good; it needs "no new privileges". Raises ``OSError``."""
    buffer = ctypes.create_string_buffer(steps, len(steps))
    program = struct.pack("@HP", len(steps) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(program, len(program))
    kernel.call(SECCOMP[kernel.column()], SET_FILTER, 0, ctypes.addressof(holder))
