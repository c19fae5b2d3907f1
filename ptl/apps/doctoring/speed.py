"""What this process's device does: products of matrices, memory, and reductions over ranks. torch is loaded here."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ptl.functional.flops import peak_flops


def device_facts(local_rank: int | None) -> dict[str, Any]:
    """CUDA, NCCL and the GPUs that torch sees.

    Arguments:
        local_rank: this rank's place on its host, which picks its device; None for all of them.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = []
    for index in range(count) if local_rank is None else [local_rank % count] if count else []:
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(
            {
                "index": index,
                "name": torch.cuda.get_device_name(index),
                "free_gib": round(free / 2**30, 2),
                "total_gib": round(total / 2**30, 2),
            }
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if count else None  # pyright: ignore[reportAttributeAccessIssue]
    return {"cuda": torch.version.cuda, "nccl": nccl, "threads": torch.get_num_threads(), "torch_gpus": gpus}


def rates(device: str, seconds: float) -> dict[str, Any]:
    """Operations a second of matrix products in fp32 and bf16, their share of the table's peak where it is known, and
    bytes a second of a copy (read and written).

    Arguments:
        device: as torch names it: ``cpu``, ``cuda:0``.
        seconds: for each of the three.
    """
    import torch

    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if cuda else None
    found: dict[str, Any] = {"device": device, "name": name}
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        rate = matmul_rate(device, dtype, 8192 if cuda else 1024, seconds)
        peak = peak_flops(name, kind) if name else None
        found[kind] = {"flops": rate, "share_of_peak": round(rate / peak, 3) if peak else None}
    size = 2**30 if cuda else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["memory_bytes"] = 2 * size / _median_seconds(lambda: target.copy_(source), device, seconds)
    return found


def matmul_rate(device: str, dtype: Any, size: int, seconds: float) -> float:
    """Operations a second of a square product, the median over ``seconds``.

    The size is halved until a product takes no longer than a tenth of ``seconds``: a processor without units for a
    type can be hundreds of times slower in it.
    """
    import torch

    while True:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(left)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _wait(device)
        if size <= 128 or time.perf_counter() - start < seconds / 10:
            return 2 * size**3 / _median_seconds(partial(torch.mm, left, right, out=out), device, seconds)
        size //= 2


def _median_seconds(work: Callable[[], Any], device: str, seconds: float) -> float:
    """Of a call, over calls that together take ``seconds``; two at least, after one to warm up."""
    work()
    _wait(device)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def reductions(
    store: Any, rank: int, hosts: list[str], device: str, *, size: int, timeout: float
) -> dict[str, float | None]:
    """Bus bandwidth of an all-reduce among the ranks of this host (``intra``) and of all hosts (``all``).

    Bytes a second that each rank sends and receives in a ring, 2 (n - 1) / n of the tensor: NCCL's own measure. None
    where there is no second rank.

    Arguments:
        store: of torch.distributed, which all ranks share.
        rank: of this process.
        hosts: of each rank.
        device: this rank's; NCCL reduces on a GPU, gloo on a CPU.
        size: bytes of the tensor.
        timeout: seconds that a rank waits for the others.

    Raises:
        RuntimeError: a rank did not come, or the network refused.
    """
    import torch

    dist = torch.distributed
    world, cuda = len(hosts), device.startswith("cuda")
    if world == 1:
        return {"intra": None, "all": None}
    if cuda:
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
    try:
        found: dict[str, float | None] = {}
        tensor = torch.ones(size // 4, device=device)
        neighbours = None
        for host in dict.fromkeys(hosts):  # every rank makes every group, in the same order
            members = [other for other, its in enumerate(hosts) if its == host]
            group = dist.new_group(members, timeout=limit)
            neighbours = (group, len(members)) if rank in members else neighbours
        assert neighbours is not None
        found["intra"] = _bus_bandwidth(tensor, neighbours[0], neighbours[1], device) if neighbours[1] > 1 else None
        dist.barrier()
        found["all"] = _bus_bandwidth(tensor, None, world, device)
        return found
    finally:
        dist.destroy_process_group()


def _bus_bandwidth(tensor: Any, group: Any, world: int, device: str, times: int = 5) -> float:
    import torch

    taken = []
    for _ in range(2 + times):
        _wait(device)
        start = time.perf_counter()
        torch.distributed.all_reduce(tensor, group=group)
        _wait(device)
        taken.append(time.perf_counter() - start)
        tensor.fill_(1.0)
    return tensor.numel() * tensor.element_size() * 2 * (world - 1) / world / statistics.median(taken[2:])
