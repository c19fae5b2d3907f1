"""Ranks that meet in a store, each within a bounded time, whoever has started them: srun, torchrun, or any that sets
``RANK`` and ``WORLD_SIZE``."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_PINGS = 5


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        rank: of ``world``.
        world: ranks.
        local: place on its host, from 0.
        address: of rank 0's host; ``port`` of its store.
        hosted: whether the launcher itself serves the store, as torchrun does.
    """

    rank: int
    world: int
    local: int
    address: str
    port: int
    hosted: bool = False


def place(environment: Mapping[str, str] | None = None) -> Place:
    """This process's place, from its launcher's variables.

    Raises:
        ValueError: there are none, or they do not say where rank 0 is.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ValueError(
                "got RANK without MASTER_ADDR and MASTER_PORT, expected all of them: set both on every rank"
            )
        hosted = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        local = int(env.get("LOCAL_RANK", "0"))
        return Place(
            int(env["RANK"]), int(env["WORLD_SIZE"]), local, env["MASTER_ADDR"], int(env["MASTER_PORT"]), hosted
        )
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1"))
        # Another port than a run's own, which may be starting in the same job, and one a step.
        port = 20000 + (int(env["SLURM_JOB_ID"]) + 101 * (1 + int(env["SLURM_STEP_ID"]))) % 20000
        address = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
        return Place(int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", "0")), address, port)
    raise ValueError(
        "got --distributed without ranks, expected RANK or SLURM_PROCID in the environment: start it by `srun ptl "
        "doctor --distributed` inside a job, or by torchrun"
    )


def _first_host(nodes: str) -> str:
    """The first host of a list in SLURM's form."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=10)
        if done.returncode == 0 and done.stdout:
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass  # inside a container there may be no scontrol
    return re.sub(r"\[(\d+).*", r"\1", nodes.split(",")[0])


class Meeting:
    """The ranks that came, and what they say to each other.

    Arguments:
        here: this process's place.
        host: this process's.
        wait: seconds for the ranks to come, and for every further exchange.

    Attributes:
        store: of torch.distributed.
        hosts: of each rank that came.
        missing: ranks that did not.

    Raises:
        ValueError: rank 0 cannot be reached.
    """

    def __init__(self, here: Place, host: str, wait: float) -> None:
        # What torch would write of a rank that does not come is a page of addresses; read when it is first imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        from torch.distributed import PrefixStore, TCPStore

        self.here, self.wait = here, wait
        limit = datetime.timedelta(seconds=wait)
        serves = here.rank == 0 and not here.hosted
        try:
            base = TCPStore(here.address, here.port, is_master=serves, wait_for_workers=False, timeout=limit)
        except Exception as error:  # torch raises its own kinds
            what = "serve" if serves else "reach"
            raise ValueError(
                f"rank {here.rank} on {host} cannot {what} the meeting place {here.address}:{here.port} within "
                f"{wait:.0f} s ({str(error).splitlines()[0]}): look at rank 0, at MASTER_ADDR and at firewalls"
            ) from None
        self.store = PrefixStore("doctor", base)
        self.say(f"host/{here.rank}", host)
        if here.rank == 0:
            came = self.collect("host", range(here.world))
            self.say("came", came)
        known: Any = self.hear("came", 2 * wait)
        self.hosts: dict[int, str] = {int(rank): name for rank, name in known.items()}
        self.missing = [rank for rank in range(here.world) if rank not in self.hosts]

    def say(self, key: str, value: Any) -> None:
        """Leaves a JSON value for the others."""
        self.store.set(key, json.dumps(value))

    def hear(self, key: str, wait: float | None = None) -> Any:
        """A value once it is there.

        Raises:
            ValueError: it did not come in time.
        """
        try:
            self.store.wait([key], datetime.timedelta(seconds=wait or self.wait))
            return json.loads(self.store.get(key))
        except Exception as error:
            raise ValueError(
                f"rank {self.here.rank} has waited for {key} in vain: {str(error).splitlines()[0]}"
            ) from None

    def together(self, what: str) -> None:
        """Waits until every rank that came is here, or has had its time."""
        self.say(f"{what}/{self.here.rank}", True)
        if self.here.rank == 0:
            self.collect(what, self.hosts)
            self.say(f"{what} over", True)
        self.hear(f"{what} over", 2 * self.wait)

    def collect(self, what: str, ranks: Iterable[int], wait: float | None = None) -> dict[int, Any]:
        """What ranks have said under ``what/RANK``: of all, or of those that have when the time is up."""
        deadline = time.monotonic() + (wait or self.wait)
        found: dict[int, Any] = {}
        wanted = list(ranks)
        while len(found) < len(wanted):
            for rank in wanted:
                if rank not in found and self.store.check([f"{what}/{rank}"]):
                    found[rank] = json.loads(self.store.get(f"{what}/{rank}"))
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return found

    def clock(self) -> float:
        """Seconds that this host's clock is ahead of rank 0's, from the quickest of a few questions; collective."""
        if self.here.rank == 0:
            for rank in sorted(self.hosts)[1:]:
                with contextlib.suppress(ValueError):  # one that is lost here has no report in the end
                    for ping in range(_PINGS):
                        self.hear(f"ping/{rank}/{ping}")
                        self.say(f"pong/{rank}/{ping}", time.time())
            return 0.0
        best, offset = float("inf"), 0.0
        for ping in range(_PINGS):
            before = time.time()
            self.say(f"ping/{self.here.rank}/{ping}", ping)
            theirs = self.hear(f"pong/{self.here.rank}/{ping}")
            after = time.time()
            if after - before < best:
                best, offset = after - before, (before + after) / 2 - theirs
        return offset
