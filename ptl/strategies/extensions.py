"""DeepSpeed's compiled parts, loaded so that a killed compilation cannot hang later runs."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LOCK = ".ptl-lock"


def load_extension(builder: Any) -> None:
    """Compiles or loads what an op builder of DeepSpeed's makes.

    torch guards a compilation by a file that outlives a process killed meanwhile, and everybody waits for it without
    end. The lock here goes with its process; whoever holds it takes a leftover away.
    DeepSpeed keeps what was loaded, so that its own call afterwards neither compiles nor waits.

    Raises:
        RuntimeError: the compiler failed.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for pattern in (f"{builder.name}/lock", f"*/{builder.name}/lock"):
            for leftover in root.glob(pattern):
                leftover.unlink(missing_ok=True)
        with _own_ninja():
            builder.load(verbose=False)


@contextmanager
def _own_ninja() -> Iterator[None]:
    """The environment's own ninja before another on the path: each version takes the other's work for stale."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before
