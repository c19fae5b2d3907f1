"""Whether all ranks of a job are there, asked before anything is loaded: who is missing is named, in minutes."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from datetime import timedelta

from lightning.fabric.plugins.environments import ClusterEnvironment
from torch.distributed import TCPStore

_HERE, _VERDICT, _HEARD = "ptl/here/{}", "ptl/verdict", "ptl/heard/{}"
LAUNCHED = "PTL_LAUNCHED"
"""Set in the process that starts the other ranks itself, for them to inherit: it does not come to a meeting."""
_GRACE = 30.0
"""Seconds that the others wait for rank 0's word beyond its own waiting, and it for them to have read it."""


def meet(environment: ClusterEnvironment, seconds: float) -> TCPStore | None:
    """Waits until every rank has said that it is there.

    torch waits half an hour for a rank that never comes, and then names none.

    Arguments:
        environment: who this rank is and where rank 0 listens.
        seconds: how long to wait.

    Returns:
        The store, which rank 0 must keep: the process group that is made later listens through it. None where one
        process starts the others itself, or is alone.

    Raises:
        ValueError: on every rank that can be told: the ranks that are missing, a port that is taken, or an address that
            cannot be reached.
    """
    if not environment.creates_processes_externally:
        os.environ[LAUNCHED] = "1"
        return None
    world, rank = environment.world_size(), environment.global_rank()
    if world == 1 or LAUNCHED in os.environ:
        return None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None  # torchrun's agents have met, and one of them listens at the port
    host, port = environment.main_address, environment.main_port
    here = socket.gethostname()
    try:
        store = TCPStore(
            host,
            port,
            world,
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,  # shared with the process group's own store in this process
        )
        store.set(_HERE.format(rank), here)
    except RuntimeError as error:
        raise ValueError(_no_store(rank, here, host, port, seconds, error)) from error
    if rank == 0:
        verdict, present = _verdict(store, world, seconds)
        store.set(_VERDICT, verdict)
        if verdict:
            # The store ends with this process: not before the others have read the verdict.
            with contextlib.suppress(RuntimeError):
                store.wait([_HEARD.format(r) for r in present if r], timedelta(seconds=_GRACE))
    else:
        try:
            store.wait([_VERDICT], timedelta(seconds=seconds + _GRACE))
            verdict = store.get(_VERDICT).decode()
            if verdict:
                store.set(_HEARD.format(rank), "")
        except RuntimeError as error:
            raise ValueError(f"rank {rank} on {here}: rank 0 at {host}:{port} has gone while it waited") from error
    if verdict:
        raise ValueError(verdict)
    return store


def _verdict(store: TCPStore, world: int, seconds: float) -> tuple[str, list[int]]:
    """What to say of the ranks that have not come, nothing where all have; and those that have."""
    deadline = time.monotonic() + seconds
    absent = []
    for rank in range(world):
        try:
            store.wait([_HERE.format(rank)], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:
            absent.append(rank)
    present = [rank for rank in range(world) if rank not in absent]
    if not absent:
        return "", present
    nodes = sorted({store.get(_HERE.format(rank)).decode() for rank in present})
    return (
        f"{len(absent)} of {world} ranks have not come within {seconds:.0f} s: {', '.join(map(str, absent[:16]))}"
        f"{' and more' if len(absent) > 16 else ''}. Those that have are on {', '.join(nodes[:16])}. Look at the log "
        "of a missing rank; a node may be down, or its ranks may have another MASTER_ADDR or MASTER_PORT "
        "(run.meeting_minutes is how long to wait)"
    ), present


def _no_store(rank: int, here: str, host: str, port: int, seconds: float, error: Exception) -> str:
    if rank == 0:
        reason = " ".join(str(error).split())[:200]
        change = "set MASTER_PORT (PTL_PORT in slurm/) to a free one"
        return f"rank 0 on {here} cannot listen at {host}:{port}: {change}; {reason}"
    return (
        f"rank {rank} on {here} cannot reach rank 0 at {host}:{port} within {seconds:.0f} s: its node may be down, or "
        "MASTER_ADDR or MASTER_PORT may be another than rank 0's"
    )
