"""A run as it is compared: its configuration, its metrics brought down to what tables and curves need, its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

POINTS = 256
"""Most buckets of steps that a curve is kept in."""
ENDED = ("finished", "stopped")
"""Statuses of runs that came to their end by themselves."""
UNFINISHED = "unfinished"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Curve:
    """A metric over steps, averaged in buckets of ``width`` steps; widths are powers of two, so that buckets nest.

    Attributes:
        width: steps in a bucket.
        bucket: int64 [N], increasing; bucket b holds the steps from ``b * width`` to ``(b + 1) * width - 1``.
        step: float64 [N], mean step of the points in it.
        mean: float64 [N], mean of their finite values; a bucket without one is left out.
        count: float64 [N], how many they are.
    """

    width: int
    bucket: np.ndarray
    step: np.ndarray
    mean: np.ndarray
    count: np.ndarray


@dataclass(frozen=True)
class Metric:
    """One metric of one run, exact over all its points but for the curve.

    Attributes:
        final: the last value, which may be NaN or infinite.
        final_step: the step of it.
        low: lowest finite value, with its step; NaN where no value is finite. ``high`` likewise.
        mean: mean of the finite values.
        points: number of values.
    """

    final: float
    final_step: int
    low: float
    low_step: int
    high: float
    high_step: int
    mean: float
    points: int
    curve: Curve


@dataclass(frozen=True)
class Online:
    """Where a run stands on a W&B server.

    Attributes:
        id: its id in the project.
        axis: what W&B calls its steps: ``trainer/global_step``, or ``_step`` where the run logged no such metric.
    """

    id: str
    axis: str


@dataclass(frozen=True)
class Run:
    """A run, wherever it was read.

    Attributes:
        name: the last part of its folder, or the name W&B shows.
        where: path or W&B path, for people.
        source: ``folder``, ``wandb`` or ``online``.
        config: the resolved configuration, flat; empty where none was found.
        status: as the run record wrote it (``finished``, ``stopped``, ``failed`` and others), ``unfinished`` where it
            wrote none, or ``unreadable``.
        facts: ``tokens_per_second_per_device``, ``mfu``, ``peak_memory_gib``, ``device_hours``; what is not known is
            absent.
        wandb_id: the id of the run in W&B, where it is known.
        wall: seconds of all attempts as the run record wrote them: the same to the last digit wherever they are read.
        digest: digest of the configuration with its run folder, or None where the folder is not in it.
        online: the run on the W&B server that was asked, or None where it was not found there.
    """

    name: str
    where: str
    source: str
    status: str
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    attempts: int | None = None
    devices: int | None = None
    step: int | None = None
    monitor: str | None = None
    wandb_id: str | None = None
    wall: float | None = None
    digest: str | None = None
    online: Online | None = None


def bucket_width(last_step: int, points: int = POINTS) -> int:
    """Smallest power of two that parts the steps 0 to ``last_step`` into at most ``points`` buckets."""
    width = 1
    while last_step // width >= points:
        width *= 2
    return width


def metric(steps: np.ndarray, values: np.ndarray, width: int) -> Metric:
    """Brings the points of a metric down.

    Arguments:
        steps: int64 [N], N > 0, each 0 or more, in the order in which they were logged.
        values: float64 [N].
        width: steps in a bucket of the curve.
    """
    import numpy as np

    finite = np.isfinite(values)
    good, at = (values, steps) if finite.all() else (values[finite], steps[finite])
    nan = float("nan")
    low, high = (int(good.argmin()), int(good.argmax())) if len(good) else (-1, -1)
    return Metric(
        final=float(values[-1]),
        final_step=int(steps[-1]),
        low=float(good[low]) if len(good) else nan,
        low_step=int(at[low]) if len(good) else -1,
        high=float(good[high]) if len(good) else nan,
        high_step=int(at[high]) if len(good) else -1,
        mean=float(good.mean()) if len(good) else nan,
        points=len(values),
        curve=curve(at, good, np.ones(len(good)), width),
    )


def curve(steps: np.ndarray, values: np.ndarray, counts: np.ndarray, width: int) -> Curve:
    """Means of finite values in buckets of ``width`` steps, each value counted ``counts`` times."""
    import numpy as np

    bucket = (steps // width).astype(np.int64)
    slots = int(bucket.max()) + 1 if len(bucket) else 0
    number = np.bincount(bucket, counts, slots)
    kept = np.flatnonzero(number)
    number = number[kept]
    return Curve(
        width=width,
        bucket=kept,
        step=np.bincount(bucket, counts * steps, slots)[kept] / number,
        mean=np.bincount(bucket, counts * values, slots)[kept] / number,
        count=number,
    )


def coarser(given: Curve, width: int) -> Curve:
    """The curve in buckets of ``width`` steps, a multiple of its own."""
    if width == given.width:
        return given
    return curve(given.step, given.mean, given.count, width)
