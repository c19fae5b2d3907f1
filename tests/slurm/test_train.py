"""``slurm/train.sbatch`` on a real cluster of two nodes: layout, preemption, limits, kills, other numbers of ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from ptl.callbacks.saved import latest_checkpoint
from tests.ranks import ROOT
from tests.slurm.jobs import STEPS, arguments, rows_of, weights_of

TRAIN = "slurm/train.sbatch"
TWO = ["--nodes=2"]
SLOWLY = ["--trainer.callbacks", '[{"class_path": "tests.slurm.slow.Slowly"}]']


def started(run: Path, step: int, seconds: float = 400) -> None:
    """Waits until the run has logged an optimizer step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(row.get("step", -1) >= step - 1 for row in rows_of(run)):
            return
        time.sleep(0.1)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in run.glob("slurm/latest/*.log"))
    raise AssertionError(f"{run} has not come to step {step}\n{logs}")


def attempts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]


def assert_same(run: Path, whole: Path, *, exactly: bool = True) -> None:
    """Both runs have learnt and logged the same."""
    ours, theirs = weights_of(run), weights_of(whole)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]) if exactly else torch.allclose(weight, theirs[name], atol=1e-5), name
    if exactly:
        assert rows_of(run) == rows_of(whole)
    else:
        assert [row["step"] for row in rows_of(run)] == [row["step"] for row in rows_of(whole)]


def uninterrupted(cluster, folder, run: Path, stage: int) -> Path:
    job = cluster.submit(TRAIN, *arguments(folder, run, stage=stage), options=TWO)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert len(rows_of(run)) >= STEPS
    return run


@pytest.fixture(scope="module")
def zero2(cluster, folder, tmp_path_factory):
    """An uninterrupted run on two nodes."""
    return uninterrupted(cluster, folder, tmp_path_factory.mktemp("whole") / "zero2", 2)


@pytest.fixture(scope="module")
def zero3(cluster, folder, tmp_path_factory):
    return uninterrupted(cluster, folder, tmp_path_factory.mktemp("whole") / "zero3", 3)


@pytest.fixture(scope="module")
def requeued(cluster, folder, tmp_path_factory):
    """A ZeRO-2 run with loader processes that got SIGUSR1 after its third step, and what its attempts left."""
    run = tmp_path_factory.mktemp("requeued") / "run"
    more = [*SLOWLY, "--data.num_workers", "2", "--trainer.logger", "ptl.callbacks.wandb_run.WandbRun"]
    job = cluster.submit(TRAIN, *arguments(folder, run, *more), options=TWO)
    started(run, 3)
    cluster.run("scancel", "--signal=USR1", str(job))
    cluster.wait_requeued(job)
    kept = shutil.copytree(run, run.parent / "stopped", symlinks=True)
    state = cluster.wait(job)
    return run, kept, state, cluster.output(job)


def test_ranks_are_laid_out_as_asked(cluster, tmp_path):
    script = tmp_path / "layout.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=2 --cpus-per-task=2\n"
        f"source {ROOT}/slurm/job.sh\nbegin {tmp_path}/run\n"
        "launch bash -c 'echo $SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID $SLURM_CPUS_PER_TASK $OMP_NUM_THREADS "
        "$MASTER_ADDR $MASTER_PORT'\nfinish $?\n"
    )
    job = cluster.submit(script)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    found = [(tmp_path / f"run/slurm/latest/rank{rank}.log").read_text().split() for rank in range(4)]
    port = str(20000 + job % 20000)
    assert found == [[str(r), str(r // 2), str(r % 2), "2", "1", "127.0.0.1", port] for r in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_trains_on_two_nodes(request, stage):
    run = request.getfixturevalue(stage)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["nodes"] == 2
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_law_6_a_signalled_job_is_requeued_and_ends_as_a_whole_one(requeued, zero2):
    run, stopped, state, said = requeued
    assert state == "COMPLETED", said
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["status"] == "preempted" and 3 <= summary["global_step"] < STEPS
    assert "ended with code 85" in said and "attempt 2" in said
    starts = [row for row in attempts(run) if row["event"] == "start"]
    assert len(starts) == 2 and (run / "slurm/latest").resolve().name == "attempt_2"
    assert_same(run, zero2)


@pytest.mark.slow
def test_law_6_the_signal_does_not_touch_loader_processes(requeued):
    run, *_ = requeued
    logs = "".join(path.read_text() for path in run.glob("slurm/attempt_*/rank*.log"))
    assert "DataLoader worker" not in logs and "Traceback" not in logs


@pytest.mark.slow
def test_law_6_both_attempts_are_one_wandb_run(requeued):
    run, *_ = requeued
    fragments = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(fragments) == 2
    assert {name.rpartition("-")[2] for name in fragments} == {json.loads((run / "run.json").read_text())["id"]}


@pytest.mark.slow
def test_law_6_two_nodes_work_goes_on_on_one(cluster, folder, requeued, zero2, tmp_path):
    _, stopped, *_ = requeued
    run = shutil.copytree(stopped, tmp_path / "run", symlinks=True)
    extra = ["--run.resume", "auto", "--trainer.accumulate_grad_batches", "4"]
    job = cluster.submit(TRAIN, *arguments(folder, run, *extra))
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert_same(run, zero2, exactly=False)


@pytest.mark.slow
def test_law_6_one_nodes_work_goes_on_on_two_and_other_runs_are_left_alone(cluster, folder, zero2, zero3, tmp_path):
    """Starts in a folder with another run's checkpoint, which must not be taken for its own."""
    run = tmp_path / "run"
    shutil.copytree(zero3 / "checkpoints", run / "checkpoints")
    (run / "hpc_ckpt_1.ckpt").write_bytes(b"another program's")
    extra = [*SLOWLY, "--run.resume", "auto", "--trainer.accumulate_grad_batches", "4"]
    job = cluster.submit(TRAIN, *arguments(folder, run, *extra), PTL_MAX_RESTARTS="0")
    started(run, 4)
    cluster.run("scancel", "--signal=USR1", str(job))
    assert cluster.wait(job) == "FAILED"  # it was not allowed to start again
    assert "stopped: started again 0 times already" in cluster.output(job)
    assert rows_of(run)[0]["step"] == 0 and "another run" in (run / "slurm/latest/rank0.log").read_text()
    job = cluster.submit(TRAIN, *arguments(folder, run, "--run.resume", "auto"), options=TWO)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert_same(run, zero2, exactly=False)


@pytest.mark.slow
def test_law_6_a_killed_rank_ends_the_job_at_once_and_loses_nothing(cluster, folder, zero2, tmp_path):
    run = tmp_path / "run"
    more = [*SLOWLY, "--checkpoint.every_n_train_steps", "2"]
    job = cluster.submit(TRAIN, *arguments(folder, run, *more), options=TWO)
    started(run, 3)
    victims = [
        int(pid)
        for pid, *command in (line.split() for line in cluster.run("ps", "-ewwo", "pid,args").splitlines()[1:])
        if str(run) in command and command[1:4] == ["-m", "ptl.cli", "fit"]
    ]
    assert len(victims) == 2
    os.kill(victims[-1], signal.SIGKILL)
    cluster.wait_requeued(job, seconds=120)  # a hang would last for the watchdog's minutes
    # 137 for the killed rank, 1 where the other one's broken connection was heard of first.
    assert re.search(r"ended with code (137|1),", cluster.output(job)), cluster.output(job)
    assert latest_checkpoint(run) is not None
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert_same(run, zero2)


@pytest.mark.slow
def test_law_6_the_time_limit_loses_nothing(cluster, folder, zero2, tmp_path):
    """SLURM signals 30 to 90 seconds before the limit of two minutes: its clock ticks once a minute."""
    run = tmp_path / "run"
    slowly = ["--trainer.callbacks", '[{"class_path": "tests.slurm.slow.Slowly", "init_args": {"seconds": 4}}]']
    more = [*slowly, "--preemption.margin_seconds", "0"]
    options = [*TWO, "--time=2", "--signal=USR1@30"]
    job = cluster.submit(TRAIN, *arguments(folder, run, *more), options=options, PTL_MAX_CRASHES="5")
    assert cluster.wait(job, seconds=600) == "COMPLETED", cluster.output(job)
    assert "(SIGUSR1); saved" in cluster.output(job)
    assert_same(run, zero2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_law_6_twenty_kills_while_saving_never_cost_a_whole_checkpoint(cluster, folder, tmp_path):
    """Both ranks of a ZeRO-2 run are killed at random moments of a save, and each next attempt goes on."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    keys = {"trainer.max_epochs": 8}
    common = ["--trainer.num_nodes=2", "--trainer.devices=1", "--checkpoint.every_n_train_steps", "1"]
    reference = cluster.submit(TRAIN, *arguments(folder, whole, **keys), options=TWO)
    plan = {
        "run": str(run),
        "arguments": arguments(folder, run, *common, "--run.resume", "auto", **keys),
        "trials": 20,
        "seed": 7,
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    script = tmp_path / "killed.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\nexport MASTER_PORT=$((20000 + SLURM_JOB_ID * 40))\n"
        f"srun --kill-on-bad-exit=1 $PTL_PYTHON -m tests.slurm.killed {tmp_path}/plan.json\n"
    )
    job = cluster.submit(script)
    assert cluster.wait(job, seconds=900) == "COMPLETED", cluster.output(job)
    seen = json.loads((tmp_path / "killed.json").read_text())
    steps = [trial["step"] for trial in seen]
    assert len(steps) == 20 and steps == sorted(steps) and steps[-1] > 0
    assert sum(trial["hit"] for trial in seen) >= 5  # the others came just before or behind the save
    last = cluster.submit(TRAIN, *arguments(folder, run, "--run.resume", "auto", **keys), options=TWO)
    assert cluster.wait(last) == "COMPLETED", cluster.output(last)
    assert cluster.wait(reference) == "COMPLETED", cluster.output(reference)
    for name, weight in weights_of(run).items():
        assert torch.equal(weight, weights_of(whole)[name]), name


def test_a_crash_loop_is_stopped_at_the_cap(cluster, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho crashing >&2\nexit 3\n")
    python.chmod(0o755)
    run = tmp_path / "run"
    job = cluster.submit(TRAIN, "--run.dir", str(run), PTL_PYTHON=str(python), PTL_MAX_CRASHES="2")
    cluster.wait_said(job, "stopped:")
    assert cluster.wait(job) == "FAILED"
    said = cluster.output(job)
    assert len(re.findall("ended with code 3", said)) == 3
    assert "stopped: 3 crashes in a row without a new checkpoint" in said


def test_where_a_job_may_not_be_requeued_a_new_one_takes_over(cluster, tmp_path):
    """It has as many nodes, counts its restarts, and stops at the cap."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 85\n")
    python.chmod(0o755)
    options = [*TWO, "--no-requeue", "--job-name=chained"]
    job = cluster.submit(
        TRAIN, "--run.dir", str(tmp_path / "run"), options=options, PTL_PYTHON=str(python), PTL_MAX_RESTARTS="1"
    )
    cluster.wait_said(job, "Submitted batch job")
    following = int(re.search(r"Submitted batch job (\d+)", cluster.output(job))[1])  # pyright: ignore
    assert cluster.wait(job) == "COMPLETED" and cluster.wait(following) == "FAILED"
    known = cluster.show(following)
    assert known["JobName"] == "chained" and known["NumNodes"] == "2"
    said = (tmp_path / f"run/slurm/{following}.out").read_text()
    assert "restart 1" in said and "stopped: started again 1 times already" in said


@pytest.mark.slow
def test_a_mistake_is_said_once_and_not_repeated(cluster, folder, tmp_path):
    """Tasks and devices that differ are found on every rank, before anybody waits for anybody."""
    head, pair = (
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\n",
        ("--trainer.num_nodes=2", "--trainer.devices=2"),
    )

    def submitted(name: str, launcher: str) -> int:
        """A job of a script of the user's own, with a run folder of its own: the jobs may run at the same time."""
        command = " ".join(f"'{part}'" for part in arguments(folder, tmp_path / name, *pair))
        script = tmp_path / f"{name}.sbatch"
        script.write_text(f"{head}{launcher}$PTL_PYTHON -m ptl.cli fit {command}\n")
        return cluster.submit(script)

    job, without_srun = submitted("own", "srun "), submitted("bare", "")
    wrong = cluster.submit(TRAIN, *arguments(folder, tmp_path / "wrong", "--model.policy.nmae", "x"))
    assert cluster.wait(job) == "FAILED"
    assert "trainer.devices is 2 and srun starts 1 tasks a node" in cluster.output(job)
    assert cluster.wait(without_srun) == "FAILED"
    assert "was started without srun" in cluster.output(without_srun)
    assert cluster.wait(wrong) == "FAILED"
    said = cluster.output(wrong)
    assert "a mistake in the command or the data: not started again" in said and "nmae" in said
