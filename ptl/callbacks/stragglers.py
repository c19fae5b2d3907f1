"""Names the rank that all others wait for.

Ranks that reduce gradients together all take as long as the slowest, so a step's time tells nothing. What a rank does
alone is its forward pass and its wait for data; these are compared.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from ptl.callbacks.clock import Clock, CudaClock, HostClock
from ptl.callbacks.health import warn
from ptl.callbacks.record import run_folder
from ptl.callbacks.throughput import log_metrics
from ptl.data.durable import append_line

FILE = "stragglers.jsonl"


class Pace(NamedTuple):
    """Seconds of a rank for a micro-batch.

    Attributes:
        forward: lower quartile of the forward passes: one that waits in a collective tells nothing of its rank.
        wait: mean wait for data.
    """

    forward: float
    wait: float

    @property
    def seconds(self) -> float:
        """Of what the rank does alone."""
        return self.forward + self.wait


class Stragglers(L.Callback):
    """Logs ``throughput/slowest_over_median``, and warns of a rank that stays slow.

    Once a window of optimizer steps the ranks exchange two numbers each over the hosts' network. A rank that took more
    than ``ratio`` times the median of all in ``windows`` windows in a row is named on stderr with its host, and in
    ``RUN/stragglers.jsonl``. Under ZeRO-3 the forward pass gathers weights from all ranks, so that only waits for data
    stand out. One rank alone is not watched.

    Arguments:
        every_n_steps: optimizer steps of a window.
        ratio: above it a rank is slow.
        windows: slow windows in a row before it is said.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(self, *, every_n_steps: int = 50, ratio: float = 1.3, windows: int = 3) -> None:
        if every_n_steps < 1 or windows < 1:
            raise ValueError(
                f"stragglers.every_n_steps and stragglers.windows must be 1 or more, got {every_n_steps} and {windows}"
            )
        if ratio <= 1:
            raise ValueError(f"stragglers.ratio must be above 1, got {ratio}")
        self.every_n_steps, self.ratio, self.windows = every_n_steps, ratio, windows
        self._group: Any = None
        self._clock: Clock | None = None
        self._hosts: list[str] = []
        self._in_a_row: list[int] = []
        self._left: float | None = None
        self._waits: list[float] = []
        self._open: int | None = None
        self._forwards: list[tuple[int, int]] = []
        self._samples = False
        self._steps = self._global_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size == 1:
            return
        device = trainer.strategy.root_device
        self._group = torch.distributed.new_group(backend="gloo")
        hosts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(hosts, socket.gethostname(), group=self._group)
        self._hosts, self._in_a_row = hosts, [0] * len(hosts)
        self._clock = CudaClock(device) if device.type == "cuda" else HostClock()
        self._samples = bool(getattr(getattr(pl_module, "view", None), "samples", False))
        self._steps, self._global_step = 0, trainer.global_step
        self._left, self._open, self._waits, self._forwards = None, None, [], []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = None

    # ---- what a rank does alone ----

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None:
            return
        if self._left is not None:
            self._waits.append(time.perf_counter() - self._left)
        self._open = self._clock.mark()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._clock is not None and self._open is not None:
            self._forwards.append((self._open, self._clock.mark()))
            self._open = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None:
            return
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._steps += 1
            if self._steps % self.every_n_steps == 0:
                self._compare(trainer)
        # Between two batches of an objective that samples all ranks sample together.
        self._left = None if self._samples else time.perf_counter()

    def pause(self) -> None:
        """What happens up to the next batch is no wait for data."""
        self._left = None

    def resume(self) -> None:
        """See ``pause``."""
        self._left = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.pause()

    # ---- all ranks ----

    def _compare(self, trainer: L.Trainer) -> None:
        own = torch.tensor(self._pace(), dtype=torch.float64)
        rows = [torch.zeros_like(own) for _ in self._hosts]
        torch.distributed.all_gather(rows, own, group=self._group)
        paces = [Pace(*row.tolist()) for row in rows]
        ratios = over_median(paces)
        log_metrics(trainer, {"throughput/slowest_over_median": max(ratios)})
        for rank, ratio in enumerate(ratios):
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if ratio > self.ratio else 0
            if self._in_a_row[rank] == self.windows and trainer.is_global_zero:
                self._name(trainer, rank, paces[rank], ratio)

    def _pace(self) -> Pace:
        assert self._clock is not None
        moments = self._clock.read()
        forwards = [moments[end] - moments[start] for start, end in self._forwards]
        waits = self._waits
        self._forwards, self._waits = [], []
        quartile = statistics.quantiles(forwards, n=4)[0] if len(forwards) > 1 else sum(forwards)
        return Pace(quartile, statistics.fmean(waits) if waits else 0.0)

    def _name(self, trainer: L.Trainer, rank: int, pace: Pace, ratio: float) -> None:
        found = {
            "step": trainer.global_step,
            "rank": rank,
            "host": self._hosts[rank],
            "over_median": round(ratio, 3),
            "forward_seconds": round(pace.forward, 6),
            "data_wait_seconds": round(pace.wait, 6),
        }
        append_line(run_folder(trainer) / FILE, json.dumps(found))
        warn(
            f"rank {rank} on {self._hosts[rank]} is slow: {ratio:.2f} times the median rank in {self.windows} windows "
            f"of {self.every_n_steps} steps in a row ({pace.forward:.3f} s forward and {pace.wait:.3f} s waiting for "
            "data for a micro-batch); all ranks wait for it. Look at its device and its disk, or leave its node out"
        )


def over_median(paces: list[Pace]) -> list[float]:
    """Each rank's seconds over the median rank's; of two the faster one is the median."""
    middle = statistics.median_low(pace.seconds for pace in paces)
    return [pace.seconds / middle if middle else 1.0 for pace in paces]
