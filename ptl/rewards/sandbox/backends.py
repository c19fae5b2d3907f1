"""The ways to start the process that waits inside, strongest first.

``bwrap+lock``: bubblewrap gives it a file system of its own (the interpreter and shared libraries, read-only, nothing
else), no network, and its own process numbers; inside, each program is locked once more. ``lock``: the same locks
without bubblewrap, for
machines where users may not make namespaces: Landlock for files and TCP, seccomp for everything else, and limits.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
START = "import sys; sys.path.insert(0, sys.argv.pop()); from inside.server import main; sys.path.pop(0); main()"


@dataclass(frozen=True)
class Backend:
    """A way to start the process inside: its name, and the words that come before the interpreter's."""

    name: str
    prefix: Callable[[], list[str]]

    def command(self) -> list[str]:
        """The whole command. Raises ``FileNotFoundError`` where a program that it needs is missing."""
        return [*self.prefix(), interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", START, str(HERE)]


def interpreter() -> str:
    """This Python, outside of any virtual environment: programs see the standard library only."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _bubblewrap() -> list[str]:
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("bubblewrap is not installed (apt install bubblewrap)")
    command = [program, "--unshare-all", "--clearenv", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534"]
    command += ["--hostname", "sandbox", "--ro-bind", "/usr", "/usr"]
    for path in ("/lib", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    roots = {os.path.dirname(interpreter()), os.path.dirname(os.path.realpath(os.__file__)), str(HERE / "inside")}
    roots.add(os.path.join(os.path.realpath(sys.base_prefix), "lib"))
    for path in sorted(root for root in roots if not root.startswith("/usr/")):
        command += ["--ro-bind", path, path]
    return [*command, "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--remount-ro", "/", "--chdir", "/"]


BACKENDS = (Backend("bwrap+lock", _bubblewrap), Backend("lock", list))
