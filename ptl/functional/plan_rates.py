"""What a machine is assumed to do in a second: one set of rates a device, each with where it is from.

Every rate can be replaced (``ptl plan --rates FILE``); none is fitted to a row of ``benchmarks/published.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ptl.functional.flops import peak_flops

_SUSTAINED = 0.85
"""Share of the best matrix product ever seen on a device that a whole layer's products keep up: narrow projections,
weight gradients, and the lower clock of a device that has been hot for an hour."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One device, its neighbours and its host.

    Attributes:
        name: as the table of peaks names it.
        memory: bytes of the device that its driver reports; of the whole host for a CPU.
        peak: dense operations a second in bf16; ``peak32`` in fp32 (TF32 where the device has it).
        matmul: share of the peak that the matrix products of a layer reach.
        attention: share of the peak that fused causal attention reaches, forward and backward together, counted as
            half of the square forward and 2.5 times that backward (FlashAttention's own count).
        bandwidth: bytes a second between the device and its memory.
        stream: share of it that element-wise kernels reach.
        launch: seconds of the host for one kernel of an eager model.
        link: bytes a second that a rank sends in a ring inside a node (NCCL's bus bandwidth).
        network: bytes a second from one device to the network.
        network_share: of it, what a ring reaches.
        latency: seconds of one hop of a ring.
        contention: how much a second of communication slows the compute it hides behind: its kernels take
            multiprocessors and memory bandwidth.
        jitter: slowdown at each doubling of the nodes: all wait for the slowest.
        host_link: bytes a second between a device and its host.
        host_memory: bytes a second of a whole host's memory, where an offloaded optimizer steps.
        per_node: devices of a node.
        context: bytes that driver, libraries and communicators take on a device before any tensor.
        unusable: share of the memory lost to fragments of the allocator.
    """

    name: str
    memory: float
    peak: float
    peak32: float
    matmul: float
    attention: float
    bandwidth: float
    stream: float = 0.85
    launch: float = 6e-6
    link: float = 360e9
    network: float = 50e9
    network_share: float = 0.85
    latency: float = 10e-6
    contention: float = 0.15
    jitter: float = 0.01
    host_link: float = 50e9
    host_memory: float = 300e9
    per_node: int = 8
    context: float = 1.5 * 2**30
    unusable: float = 0.05


def _rates(name: str, best: float, attention: float, **more: Any) -> Rates:
    half, full = peak_flops(name, "bf16"), peak_flops(name, "tf32")
    assert half is not None
    return Rates(name=name, peak=half, peak32=full or half / 2, matmul=best * _SUSTAINED, attention=attention, **more)


GIB = 2**30
DEVICES: Mapping[str, Rates] = {
    # `best`: largest bf16 matrix product found on the device over its peak, as the "maximum achievable" tables of
    # S. Bekman's Machine Learning Engineering book list them (A100 0.87, H100 0.80, B200 0.78, MI300X 0.60).
    # `attention`: FlashAttention-2 on long causal sequences, heads of 128: H100 about 0.40 forward and 0.31 backward
    # (FlashAttention-3's paper, arXiv:2407.08608, figures 5 and 6), A100 0.60 and 0.55 (arXiv:2307.08691).
    # `bandwidth`: data sheets. `link`: 0.8 of NVLink's one-way rate. `network`: one 400 Gb/s port a GPU (200 for A100).
    "h100": _rates("H100", 0.80, 0.33, memory=79 * GIB, bandwidth=3.35e12),
    "h200": _rates("H200", 0.80, 0.33, memory=140 * GIB, bandwidth=4.8e12),
    # Kernels that are bound by power run at a clock that goes with about its square root: 500 W of 700 W. HBM2e.
    "h100-500w": _rates(
        "H100", 0.80 * (500 / 700) ** 0.5, 0.33 * (500 / 700) ** 0.5, memory=94 * GIB, bandwidth=2.4e12
    ),
    "a100": _rates(
        "A100",
        0.87,
        0.56,
        memory=79 * GIB,
        bandwidth=2.04e12,
        link=240e9,
        network=25e9,
        host_link=25e9,
        host_memory=200e9,
    ),
    "a100-40gb": _rates(
        "A100",
        0.87,
        0.56,
        memory=39 * GIB,
        bandwidth=1.56e12,
        link=240e9,
        network=25e9,
        host_link=25e9,
        host_memory=200e9,
    ),
    "b200": _rates("B200", 0.78, 0.30, memory=178 * GIB, bandwidth=7.7e12, link=720e9),
    "mi300x": _rates("MI300X", 0.60, 0.25, memory=192 * GIB, bandwidth=5.3e12, link=300e9),
    "l40s": _rates("L40S", 0.75, 0.45, memory=45 * GIB, bandwidth=864e9, link=20e9, network=12.5e9, host_link=25e9),
    "l4": _rates("L4", 0.55, 0.40, memory=22 * GIB, bandwidth=300e9, link=10e9, network=3e9, host_link=12e9),
    "rtx4090": _rates(
        "RTX 4090", 0.90, 0.60, memory=24 * GIB, bandwidth=1.01e12, link=20e9, network=1.2e9, host_link=25e9
    ),
    "v100": Rates(
        name="V100",
        memory=32 * GIB,
        peak=125e12,
        peak32=15.7e12,
        matmul=0.65,
        attention=0.3,
        bandwidth=900e9,
        link=120e9,
    ),
    # A core with 256-bit vectors at some 2.5 GHz: 16 products of fp32 a cycle and sum, half of it reached.
    "cpu": Rates(
        name="cpu",
        memory=16 * GIB,
        peak=80e9,
        peak32=80e9,
        matmul=0.5,
        attention=0.25,
        bandwidth=10e9,
        link=2e9,
        network=1e9,
        host_link=10e9,
        host_memory=10e9,
        per_node=1,
        context=0.0,
        unusable=0.0,
    ),
}


def rates_of(device: str, changes: Mapping[str, Any] | None = None) -> Rates:
    """The rates of a device, with some of them replaced.

    Raises:
        ValueError: an unknown device, or a change that is no rate or no number above 0; the message names it.
    """
    if device not in DEVICES:
        raise ValueError(
            f"got device {device!r}, expected one of {', '.join(DEVICES)}; for another, change the nearest with --rates"
        )
    known = {field.name for field in fields(Rates)} - {"name"}
    for key, value in (changes or {}).items():
        if key not in known:
            raise ValueError(f"got the rate {key!r}, expected one of {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"the rate {key} is {value!r}, expected a number of 0 or more (1.0e+12, with a dot)")
    return replace(DEVICES[device], **(changes or {}))
