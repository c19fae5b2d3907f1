"""Landlock: which files a process may touch, whatever user it is. Works without privileges and without namespaces.

Everything that the kernel's version can refuse is refused: files (version 1), TCP (4), abstract sockets and signals to
processes outside (6). What is allowed is to read the entries given, and nothing else.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from . import kernel

CREATE, ADD_RULE, RESTRICT = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights over files, by the first version that has them."""
NETWORK_RIGHTS, SCOPES = 0b11, 0b11


def version() -> int:
    """The kernel's Landlock version, 0 where it has none or it is off."""
    try:
        return kernel.call(CREATE, 0, 0, VERSION_FLAG)
    except OSError:
        return 0


def ruleset(entries: Iterable[tuple[str, int]]) -> int:
    """A descriptor of the rules: everything is refused but ``entries``, pairs of a path and READ_FILE or READ_FOLDER
    bits.

    Paths that are missing are left out. Raises ``OSError`` where there is no Landlock.
    """
    has = version()
    if has < 1:
        raise OSError("this kernel has no Landlock (it needs Linux 5.13 or later, with Landlock switched on)")
    rights = max(value for first, value in FILE_RIGHTS.items() if first <= has)
    words = [rights] + [NETWORK_RIGHTS] * (has >= 4) + [SCOPES] * (has >= 6)
    attributes = (ctypes.c_uint64 * len(words))(*words)
    rules = kernel.call(CREATE, ctypes.addressof(attributes), ctypes.sizeof(attributes), 0)
    for path, allowed in entries:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            rule = allowed.to_bytes(8, "little") + beneath.to_bytes(4, "little")  # a packed struct of 12 bytes
            buffer = ctypes.create_string_buffer(rule, len(rule))
            kernel.call(ADD_RULE, rules, PATH_BENEATH, ctypes.addressof(buffer), 0)
        finally:
            os.close(beneath)
    return rules


def restrict(rules: int) -> None:
    """Puts the calling process, and all that comes of it, under the rules for good. Raises ``OSError``."""
    kernel.call(RESTRICT, rules, 0)


def standard_library() -> list[tuple[str, int]]:
    """What a program may read: the standard library, without the packages that are installed beside it.

    Those may hold anything, among them data sets with the answers. Their names can be listed, their files not read.
    """
    top = os.path.dirname(os.path.realpath(os.__file__))
    entries = [(top, READ_FOLDER)]
    for entry in os.scandir(top):
        if entry.name not in ("site-packages", "dist-packages", "test", "idlelib", "ensurepip"):
            entries.append((entry.path, READ_FILE | READ_FOLDER if entry.is_dir() else READ_FILE))
    return entries
