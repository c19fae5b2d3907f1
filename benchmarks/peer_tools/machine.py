"""What one measured process needs to know of its machine: time, peak memory, and the rate of a plain matrix product."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch


def peak_memory(device: str) -> int:
    """Bytes: the most that this process held at one time, in the machine's memory or, on CUDA, in the GPU's.

    On Linux the high-water mark of the address space is read (``VmHWM``); ``ru_maxrss`` would count what the parent
    held when it started this process.
    """
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: str) -> None:
    """Waits for the GPU's queue; nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


class StepClock:
    """Time of each optimizer step, from the end of the one before.

    Attributes:
        seconds: wall time, one number a finished step; the first counts from ``start``.
        cpu_seconds: the same of all cores together, as this process used them; a check of ``seconds`` on a machine
            that others use too.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._last: tuple[float, float] | None = None

    def start(self) -> None:
        synchronize(self.device)
        self._last = (time.perf_counter(), time.process_time())

    def mark(self) -> None:
        """Ends a step.

        Raises:
            RuntimeError: ``start`` was not called.
        """
        if self._last is None:
            raise RuntimeError("the clock was not started")
        synchronize(self.device)
        now = (time.perf_counter(), time.process_time())
        self.seconds.append(now[0] - self._last[0])
        self.cpu_seconds.append(now[1] - self._last[1])
        self._last = now


def matmul_rate(device: str, dtype: torch.dtype, *, size: int | None = None, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product, the best of repetitions over ``seconds`` after one to warm up.

    Its ``size`` is 2,048 on a CPU and 8,192 on a GPU, which smaller ones do not fill, unless given.

    The size is halved until a product takes no longer than ``seconds``: a processor without units for a type can be
    hundreds of times slower in it.
    """
    size = size or (8192 if device == "cuda" else 2048)
    small = min(size, 128)
    fastest = _product_seconds(device, dtype, small, seconds / 10)
    while size > small and fastest * (size / small) ** 3 > seconds:
        size //= 2
    return 2 * size**3 / _product_seconds(device, dtype, size, seconds)


def _product_seconds(device: str, dtype: torch.dtype, size: int, seconds: float) -> float:
    """The shortest time of a product of ``size``."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    (left @ right).sum()
    synchronize(device)
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best
