"""The helper that starts rank processes: results in order, failures shown, nothing left running."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests import forks, ranks
from tests.ranks import RanksFailedError, run_ranks

HERE = "tests.strategies.test_ranks"


def add_ranks(base: int) -> dict[str, int]:
    """Run by the ranks: a real all-reduce over gloo."""
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.tensor(base + ranks.rank())
    torch.distributed.all_reduce(total)
    return {"rank": ranks.rank(), "world": ranks.world_size(), "sum": int(total)}


def fail_on(bad: int, folder: str) -> None:
    """Run by the ranks: one raises, the other would wait for an hour."""
    Path(folder, f"{ranks.rank()}.pid").write_text(str(os.getpid()))
    if ranks.rank() == bad:
        raise ValueError("the mistake of one rank")
    print("the other rank waits", flush=True)
    time.sleep(3600)


def test_results_come_in_rank_order():
    results = run_ranks(f"{HERE}:add_ranks", 2, {"base": 10}, timeout=60)
    assert results == [{"rank": rank, "world": 2, "sum": 21} for rank in (0, 1)]


def test_a_rank_that_fails_is_shown_and_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    start = time.monotonic()
    with pytest.raises(RanksFailedError) as error:
        run_ranks(f"{HERE}:fail_on", 2, {"bad": 1, "folder": str(tmp_path)}, timeout=60)
    assert "the mistake of one rank" in str(error.value)
    assert "the other rank waits" in str(error.value)
    assert time.monotonic() - start < 30
    pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2 and not any(forks.lives(pid) for pid in pids)


def test_a_hang_ends_at_the_limit_with_the_stacks(tmp_path):
    with pytest.raises(RanksFailedError) as error:
        run_ranks(f"{HERE}:fail_on", 1, {"bad": 5, "folder": str(tmp_path)}, timeout=3)
    assert "time is up after 9 s, ranks [0] still ran" in str(error.value)
    assert "test_ranks.py" in str(error.value) and "in fail_on" in str(error.value)


def test_a_script_can_be_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, pathlib\n"
        "out = {'args': json.loads(os.environ['PTL_TEST_ARGS']), 'mine': os.environ['MINE']}\n"
        "pathlib.Path(os.environ['PTL_TEST_RESULT']).write_text(json.dumps(out))\n"
    )
    results = run_ranks(script, 2, {"a": 1}, timeout=30, env={"MINE": "rank-{rank}"})
    assert results == [{"args": {"a": 1}, "mine": f"rank-{rank}"} for rank in (0, 1)]
