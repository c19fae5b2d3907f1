"""Speed of training, honestly: tokens of all ranks, step times, use of the hardware, memory, waiting for data.

Nothing waits for the device between two logs. Counts are added up on the device; at a log they are reduced over the
ranks together with the step times, in two collectives. Validation, checkpoints, samples and the first steps
(compilation, allocator, caches) are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn

from ptl.callbacks.clock import CudaClock, HostClock, StepTimer, median_and_p90
from ptl.callbacks.hardware import compute_dtype, device_peak, peak_memory
from ptl.callbacks.shape import model_shape
from ptl.functional.flops import ModelShape, Work, training_flops
from ptl.types import TokenBatch

STATE_KEY = "throughput"


class Throughput(L.Callback):
    """Logs ``throughput/...`` once a window of optimizer steps, and keeps a summary for the run record.

    Logged, over all ranks: ``tokens_per_second`` (real tokens), ``trained_tokens_per_second`` (loss weight above 0),
    ``padded_tokens_per_second`` (padding counted too), ``tokens_per_second_per_device``, ``padding_fraction``,
    ``step_seconds_median`` and ``step_seconds_p90`` (of the slowest rank in each step),
    ``flops_per_second_per_device``, ``mfu`` (share of the devices' dense peak; absent where the peak is unknown),
    ``peak_memory_gib`` (reserved on the fullest GPU, else resident in the fullest process), ``data_wait_fraction``
    (share of the time the hosts spent between batches), ``tokens_seen`` and ``trained_tokens_seen`` (since the start
    of the run, resumed attempts included).

    Arguments:
        every_n_steps: optimizer steps of a window; the trainer's ``log_every_n_steps`` by default.
        warmup: first optimizer steps of this process that are left out.
        peak_flops: dense peak of one device in operations a second, for a device that is not in the table.
        price_per_device_hour: what a device costs for an hour, in any currency; the run's summary has the cost then.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        warmup: int = 10,
        peak_flops: float | None = None,
        price_per_device_hour: float | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Throughput.every_n_steps must be 1 or more, got {every_n_steps}")
        if warmup < 0:
            raise ValueError(f"Throughput.warmup must be 0 or more, got {warmup}")
        if price_per_device_hour is not None and not price_per_device_hour >= 0:
            raise ValueError(f"Throughput.price_per_device_hour must be 0 or more, got {price_per_device_hour}")
        self.every_n_steps = every_n_steps
        self.warmup = warmup
        self.peak_flops = peak_flops
        self.price_per_device_hour = price_per_device_hour
        self._shape: ModelShape | None = None
        self._peak: float | None = None
        self._timer: StepTimer | None = None
        self._counts = torch.zeros(0)
        self._seen = torch.zeros(2, dtype=torch.int64)
        self._global_step = 0
        self._skipped = 0
        self._saving = False
        self._windows: list[dict[str, float]] = []
        self._durations: list[float] = []

    # ---- start and end ----

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        policy = getattr(pl_module, "policy", None)
        self._shape = model_shape(policy) if isinstance(policy, nn.Module) and hasattr(policy, "config") else None
        self._peak = self.peak_flops or device_peak(device, compute_dtype(trainer, policy))
        self._timer = StepTimer(CudaClock(device) if device.type == "cuda" else HostClock())
        self._counts = torch.zeros(5, dtype=torch.int64, device=device)
        self._seen = self._seen.to(device)
        self._global_step = trainer.global_step
        self._skipped = 0
        self._windows, self._durations = [], []

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_window(trainer)
        self._timer = None

    # ---- steps ----

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._timer is None:
            return
        if self._saving:
            self._saving = False
            self._timer.release()
        self._timer.batch_arrived()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._timer is None:
            return
        # Ranks that share a batch are all given the whole of it: the first of them counts.
        if trainer.global_rank % getattr(pl_module, "sequence_parallel", 1) == 0:
            self._counts += count_tokens(batch, self._shape.window if self._shape else 0, self._counts.device)
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._timer.step_done()
            self._end_of_step(trainer)
        self._timer.batch_done()

    def _end_of_step(self, trainer: L.Trainer) -> None:
        assert self._timer is not None
        if self._skipped < self.warmup:
            self._skipped += 1
            if self._skipped == self.warmup:
                self._timer.read()
                self._take_counts()
            return
        every = self.every_n_steps or getattr(trainer, "log_every_n_steps", 0) or 1
        if trainer.global_step % every == 0:
            self._log_window(trainer)

    # ---- what is not training ----

    def pause(self) -> None:
        """What follows, up to ``resume``, is not counted; pauses nest."""
        if self._timer is not None:
            self._timer.hold()

    def resume(self) -> None:
        """Counting goes on."""
        if self._timer is not None:
            self._timer.release()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.resume()

    # ---- state ----

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the tokens seen; every rank is here, because every rank dumps a checkpoint."""
        if not len(self._counts):
            return
        if self._timer is not None and not self._timer.held:
            # Lightning says when a save starts but not when it ends: what is left of this gap is cut out with it.
            self._timer.hold()
            self._saving = True
        trained = self._counts[:2].to(torch.float64) + self._seen.to(torch.float64)
        total = trainer.strategy.reduce(trained, reduce_op="sum")
        checkpoint[STATE_KEY] = [int(value) for value in total.tolist()]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        seen = checkpoint.get(STATE_KEY, [0, 0])
        # The sum over ranks is what is kept; one rank carries it on.
        self._seen = torch.tensor(seen if trainer.is_global_zero else [0, 0], dtype=torch.int64)

    # ---- windows ----

    def _take_counts(self) -> list[int]:
        """This rank's counts since the last call: real, trained and padded tokens, pairs, sliding pairs."""
        self._seen += self._counts[:2]
        counts = self._counts.tolist()
        self._counts.zero_()
        return counts

    def _log_window(self, trainer: L.Trainer) -> None:
        if self._timer is None or self._skipped < self.warmup or not self._timer.steps:
            return
        durations, waited = self._timer.read()
        counts = self._take_counts()
        metrics, slowest = self._reduce(trainer, durations, waited, counts)
        self._windows.append(metrics)
        self._durations.extend(slowest)
        log_metrics(trainer, {f"throughput/{name}": value for name, value in metrics.items()})

    def _reduce(
        self, trainer: L.Trainer, durations: list[float], waited: float, counts: list[int]
    ) -> tuple[dict[str, float], list[float]]:
        """The window's metrics over all ranks, and the slowest rank's time in each step."""
        real, trained, padded, pairs, sliding = counts
        flops = (
            training_flops(self._shape, Work(real, trained, pairs, sliding))
            if self._shape is not None
            else float("nan")
        )
        # A rank without a known peak makes the sum of peaks unknown, which NaN says by itself.
        peak = self._peak if self._peak is not None else float("nan")
        sums = [real, trained, padded, flops, peak, waited, *self._seen.tolist()]
        device = trainer.strategy.root_device
        total = trainer.strategy.reduce(torch.tensor(sums, dtype=torch.float64, device=device), reduce_op="sum")
        maxima = torch.tensor([peak_memory(device), *durations], dtype=torch.float64, device=device)
        memory, *slowest = trainer.strategy.reduce(maxima, reduce_op="max").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        real, trained, padded, flops, peak, waited, seen, trained_seen = total.tolist()  # pyright: ignore[reportAttributeAccessIssue]
        seconds, world = sum(slowest), trainer.world_size
        median, p90 = median_and_p90(slowest)
        metrics = {
            "tokens_per_second": real / seconds,
            "trained_tokens_per_second": trained / seconds,
            "padded_tokens_per_second": padded / seconds,
            "tokens_per_second_per_device": real / seconds / world,
            "padding_fraction": 1 - real / padded if padded else 0.0,
            "step_seconds_median": median,
            "step_seconds_p90": p90,
            "flops_per_second_per_device": flops / seconds / world,
            "mfu": flops / seconds / peak,
            "peak_memory_gib": memory / 2**30,
            "data_wait_fraction": waited / world / seconds,
            "tokens_seen": seen,
            "trained_tokens_seen": trained_seen,
        }
        return {name: value for name, value in metrics.items() if value == value}, slowest

    def summary(self) -> dict[str, Any]:
        """What the run record keeps: means over the measured steps, and the deviation over windows.

        None stands for what is not known: no step after the warm-up, a device without a known peak.
        """
        out: dict[str, Any] = {"warmup_steps": self.warmup, "measured_steps": len(self._durations)}
        names = ("tokens_per_second", "trained_tokens_per_second", "padded_tokens_per_second")
        names += ("tokens_per_second_per_device",)
        for name in (*names, "flops_per_second_per_device", "mfu"):
            values = [window[name] for window in self._windows if name in window]
            out[name] = statistics.fmean(values) if values else None
            if name in names:
                out[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        for name in ("padding_fraction", "data_wait_fraction"):
            out[name] = statistics.fmean(w[name] for w in self._windows) if self._windows else None
        median, p90 = median_and_p90(self._durations) if self._durations else (None, None)
        out["step_seconds_median"], out["step_seconds_p90"] = median, p90
        for name in ("peak_memory_gib", "tokens_seen", "trained_tokens_seen"):
            out[name] = self._windows[-1][name] if self._windows else None
        return out


@runtime_checkable
class Pausable(Protocol):
    """A callback that watches the time of training, and nothing else's."""

    def pause(self) -> None:
        """What follows, up to ``resume``, is not training; pauses nest."""
        ...

    def resume(self) -> None:
        """Training goes on."""
        ...


@contextmanager
def excluded(trainer: L.Trainer) -> Iterator[None]:
    """What happens inside is not training: no callback of the trainer that can pause counts its time."""
    meters = [callback for callback in trainer.callbacks if isinstance(callback, Pausable)]  # pyright: ignore[reportAttributeAccessIssue]
    for meter in meters:
        meter.pause()
    try:
        yield
    finally:
        for meter in meters:
            meter.resume()


def count_tokens(batch: Any, window: int, device: torch.device) -> Tensor:
    """Real, trained and padded tokens, sum of squared document lengths, and the same with one side cut at ``window``.

    Every ``TokenBatch`` inside the batch counts, however deep in tuples, lists and dicts it lies. No value is read on
    the host.

    Returns:
        int64 [5] on ``device``.
    """
    total = torch.zeros(5, dtype=torch.int64, device=device)
    for tokens in token_batches(batch):
        if tokens.cu_seqlens is not None:
            lengths = tokens.cu_seqlens.diff().to(torch.int64)
        elif tokens.attention_mask is not None:
            lengths = tokens.attention_mask.sum(dim=1)
        else:
            lengths = torch.full(tokens.input_ids.shape[:1], tokens.input_ids.shape[1], device=device)
        total += torch.stack(
            [
                lengths.sum(),
                (tokens.loss_mask > 0).sum(),
                # Filled on the device: a copy from the host would wait for the stream.
                torch.full((), tokens.input_ids.numel(), dtype=torch.int64, device=lengths.device),
                (lengths * lengths).sum(),
                (lengths * lengths.clamp(max=window)).sum(),
            ]
        ).to(device)
    return total


def token_batches(batch: Any) -> Iterator[TokenBatch]:
    """Every ``TokenBatch`` in a batch, however deep in tuples, lists and dicts it lies."""
    if isinstance(batch, TokenBatch):
        yield batch
    elif isinstance(batch, dict):
        for item in batch.values():
            yield from token_batches(item)
    elif isinstance(batch, list | tuple):
        for item in batch:
            yield from token_batches(item)


def log_metrics(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    """Hands metrics that are already reduced over ranks to the trainer's loggers, on rank 0."""
    if trainer.is_global_zero and metrics:
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=logged_step(trainer))


def logged_step(trainer: L.Trainer) -> int:
    """Number of the last optimizer step as Lightning's own logs give it: from 0."""
    return max(trainer.global_step - 1, 0)
