"""Ranks that are missing are named in time, and those that have met can make their process group."""

from __future__ import annotations

import os

from tests import forks
from tests.ranks import ROOT, free_port, run_ranks

MEET = """
import sys
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from ptl.strategies.meeting import meet
try:
    meet(TorchElasticEnvironment(), float(sys.argv[1]))
except ValueError as mistake:
    print(mistake)
    sys.exit(2)
"""


def meet_and_sum() -> dict[str, float]:
    import torch
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    from ptl.strategies.meeting import meet

    store = meet(TorchElasticEnvironment(), 30)
    assert store is not None
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(float(torch.distributed.get_rank() + 1))
    torch.distributed.all_reduce(total)
    return {"total": float(total)}


def test_ranks_that_have_met_make_their_process_group():
    assert [r["total"] for r in run_ranks("tests.strategies.test_meeting:meet_and_sum", 2, timeout=60)] == [3.0, 3.0]


def start(rank: int, world: int, port: int, seconds: float) -> forks.Program:
    env = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
    }  # fmt: skip
    return forks.begin(["-c", MEET, str(seconds)], env, cwd=ROOT)


def said(process: forks.Program) -> str:
    done = process.finish(timeout=90)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stdout


def test_missing_ranks_are_named_on_every_rank_that_has_come():
    port = free_port()
    first, second = start(0, 4, port, 5), start(1, 4, port, 5)
    for output in (said(first), said(second)):
        assert "2 of 4 ranks have not come within 5 s: 2, 3." in output


def test_a_wrong_port_is_named():
    output = said(start(1, 2, free_port(), 3))
    assert "rank 1 on" in output and "cannot reach rank 0 at 127.0.0.1:" in output


def test_a_port_that_is_taken_is_named():
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        output = said(start(0, 2, taken.getsockname()[1], 3))
    assert "rank 0 on" in output and "cannot listen at 127.0.0.1:" in output and "PTL_PORT" in output


def test_a_rank_alone_waits_for_nobody():
    from lightning.fabric.plugins.environments import LightningEnvironment

    from ptl.strategies.meeting import meet

    assert meet(LightningEnvironment(), 1) is None
