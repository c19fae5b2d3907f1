"""``slurm/sweep.sbatch --agent``: W&B's own agent on a real cluster, with the sweep of ``configs/sweep``.

Of W&B's server there is what ``tests.callbacks.wandb_server`` answers. A trial that says that it is being preempted
and ends with a code other than 0 is given out again, as W&B's documentation has it.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.callbacks.wandb_server import Server
from tests.ranks import ROOT
from tests.slurm.jobs import weights_of
from tests.slurm.test_train import attempts, started

SWEEP, STEPS = "sweep123", 6
PARAMETERS = {"model.optimizer.lr": 0.002, "model.policy.adapter.rank": 8, "seed_everything": 1}


@pytest.fixture
def server():
    with Server.running() as server:
        yield server


@pytest.fixture
def project(tmp_path):
    """A folder to submit from, as a clone of the project."""
    for name in ("slurm", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def make_sweep(folder: Path, project: Path, **trainer: Any) -> str:
    """The sweep of ``configs/sweep``, over a tiny model on the CPU."""
    steps = {"max_epochs": -1, "max_steps": STEPS, "check_val_every_n_epoch": None, "val_check_interval": 2}
    quiet = {"log_every_n_steps": 1, "accumulate_grad_batches": 1, "enable_progress_bar": False}
    small = {
        "trainer": {"accelerator": "cpu", "precision": "32-true", **steps, **quiet, **trainer},
        "model": {"policy": {"name": f"{folder}/model", "dtype": "fp32", "gradient_checkpointing": False}},
        "data": {
            **{"train": [{"path": f"{folder}/rows.jsonl"}], "val_fraction": 0.2, "max_length": 256, "pack_to": 256},
            "preparation": {"num_proc": 1, "cache_dir": f"{folder}/cache"},
        },
    }
    (project / "small.yaml").write_text(yaml.safe_dump(small))
    sweep = yaml.safe_load((ROOT / "configs/sweep/example.yaml").read_text())
    assert sweep["parameters"].keys() == PARAMETERS.keys()
    sweep["command"][-1:-1] = ["-c", f"{project}/small.yaml"]
    return yaml.safe_dump(sweep)


def submit(cluster, server: Server, project: Path, count: int) -> int:
    """Submits as a person does from the project's folder."""
    env = {**cluster.environment, **server.variables, "HOME": str(project)}
    done = subprocess.run(
        ["slurm/sweep.sbatch", "--agent", f"lab/ptl/{SWEEP}", "--count", str(count),
         "--sbatch", f"--output={cluster.folder}/job-%A_%a.out"],
        cwd=project, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1])


def logs(project: Path) -> str:
    return "\n".join(path.read_text(errors="replace") for path in project.glob(f"runs/{SWEEP}/tasks/*/slurm/*/*.log"))


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["trainer/global_step"] for row in rows if "train/loss" in row]


@pytest.mark.slow
def test_each_task_runs_one_trial_of_its_agent(cluster, folder, project, server):
    """The second cannot be trained: W&B's agent ends well, the task does not."""
    server.sweep = make_sweep(folder, project)
    server.add_trial("trialone", **PARAMETERS)
    server.add_trial("trialtwo", **{**PARAMETERS, "model.optimizer.lr": -1.0})
    job = submit(cluster, server, project, count=2)
    states = [cluster.wait(f"{job}_{task}", seconds=400) for task in range(2)]
    said = "".join(cluster.output(f"{job}_{task}") for task in range(2))
    assert sorted(states) == ["COMPLETED", "FAILED"], said + logs(project)
    assert f"trial trialtwo of lab/ptl/{SWEEP} has failed" in said and "trialone" not in said
    assert len(server.hosts) == 2 and not server.trials and "optimizer.lr must be above 0, got -1.0" in logs(project)

    # It was the agent's run, with the agent's arguments, in a folder of its own.
    run = project / "runs" / SWEEP / "trialone"
    tried = "--model.optimizer.lr=0.002 --model.policy.adapter.rank=8 --seed_everything=1"
    assert (run / "command.txt").read_text().strip().endswith(tried)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["lr"] == 0.002 and config["seed_everything"] == 1
    assert config["model"]["init_args"]["policy"]["adapter"]["rank"] == 8
    assert json.loads((run / "run.json").read_text()) == {"id": "trialone"}
    assert len(list(run.glob("wandb/run-*-trialone"))) == 1 and list(project.glob("wandb/*")) == [
        project / f"wandb/sweep-{SWEEP}"
    ]

    # And so W&B was told.
    assert list(server.runs) == ["trialone"]
    told = server.runs["trialone"]
    first = told.upserts[0]
    assert (first["sweep"], first["entity"], first["project"], first["name"]) == (SWEEP, "lab", "ptl", "trialone")
    assert (first["groupName"], first["displayName"], first["jobType"]) == (SWEEP, "trialone", "lora")
    assert {key: json.loads(first["config"])[key]["value"] for key in PARAMETERS} == PARAMETERS
    ours = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps_of(told.rows) == list(range(STEPS))
    for name in ("train/loss", "val/loss"):
        assert [row[name] for row in told.rows if name in row] == [row[name] for row in ours if name in row]
    summary = json.loads((run / "summary.json").read_text())
    assert told.summary["run/status"] == "finished" and told.summary["run/best/value"] == summary["best"]["value"]
    assert told.exits == [0] and "versions.json" in told.files


@pytest.mark.slow
def test_law_6_a_preempted_trial_goes_on_where_it_was(cluster, folder, project, server):
    """SLURM's signal reaches the agent too, which must not die of it."""
    slowly = {"class_path": "tests.slurm.slow.Slowly", "init_args": {"seconds": 1.0}}
    server.sweep = make_sweep(folder, project, callbacks=[slowly])
    server.add_trial("stopped1", **PARAMETERS)
    job = submit(cluster, server, project, count=1)
    run = project / "runs" / SWEEP / "stopped1"
    started(run, 2)
    cluster.run("scancel", "--signal=USR1", f"{job}_0")
    cluster.wait_said(f"{job}_0", "attempt 2", seconds=300)
    server.add_trial("whole001", **PARAMETERS)
    whole = submit(cluster, server, project, count=1)
    said = cluster.wait(f"{job}_0") + cluster.wait(f"{whole}_0")
    assert said == "COMPLETED" * 2, cluster.output(f"{job}_0") + cluster.output(f"{whole}_0") + logs(project)
    ends = [row["status"] for row in attempts(run) if row["event"] == "end"]
    assert ends == ["preempted", "finished"] and re.search(r"stopped after optimizer step [2-5] ", logs(project))
    told = server.runs["stopped1"]
    assert told.exits == [85, 0] and steps_of(told.rows) == list(range(STEPS)) and len(server.hosts) == 3
    assert {upsert["sweep"] for upsert in told.upserts if upsert.get("jobType")} == {SWEEP}
    ours, theirs = weights_of(run), weights_of(run.parent / "whole001")
    assert all((weight == theirs[name]).all() for name, weight in ours.items()) and ours.keys() == theirs.keys()
