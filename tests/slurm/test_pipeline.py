"""Stages chained by dependency, sweeps as arrays, and what the scripts refuse, on a real cluster."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.objectives import ranking, rl
from tests.ranks import ROOT
from tests.slurm.jobs import arguments


@pytest.fixture(scope="module")
def rows(folder):
    """Rankings and prompts beside the conversations."""
    ranking.write_rows(folder / "rankings.jsonl")
    rl.write_rows(folder / "prompts.jsonl")
    return folder


def script(cluster, *command: str, check: bool = True, **env: str) -> str:
    """Runs a script of ``slurm/`` as a person on the login node does."""
    done = subprocess.run(
        command, cwd=ROOT, env={**cluster.environment, **env}, capture_output=True, text=True, timeout=60
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def words(folder: Path, file: str, *extra: str, policy: bool = False) -> str:
    """A stage's arguments as one text, without the run folder."""
    parts = arguments(folder, Path("-"), *extra, stage=None, ranks=1, **{"trainer.max_steps": 2})
    drop = {
        "--run.dir",
        *([] if policy else ["--model.policy.name"]),
        "--data.train",
        "--trainer.max_epochs",
        "--model",
    }
    pairs = zip(parts[::2], parts[1::2], strict=True)
    kept = " ".join(f"{key} {value}" for key, value in pairs if key not in drop)
    return f"{kept} --data.train.path {folder}/{file}"


@pytest.mark.slow
def test_three_stages_take_each_others_exports(cluster, rows, tmp_path):
    study = tmp_path / "study"
    said = script(
        cluster, "slurm/pipeline.sh", "--sbatch", f"--output={cluster.folder}/job-%j.out", str(study),
        "sft=--model ptl.objectives.sft.SFT " + words(rows, "rows.jsonl", policy=True),
        "reward=--model ptl.objectives.reward.RewardModeling " + words(rows, "rankings.jsonl"),
        "distilled=--model ptl.objectives.distillation.Distillation --model.policy.name {sft} "
        "--model.teacher.model.name {sft} " + words(rows, "rows.jsonl"),
    )  # fmt: skip
    jobs = [int(number) for number in re.findall(r"job (\d+)", said)]
    assert len(jobs) == 3
    assert [cluster.wait(job, seconds=600) for job in jobs] == ["COMPLETED"] * 3, [cluster.output(j) for j in jobs]
    manifests = {name: json.loads((study / name / "stage.json").read_text()) for name in ("sft", "reward", "distilled")}
    assert [m["objective"] for m in manifests.values()] == ["SFT", "RewardModeling", "Distillation"]
    for name in ("reward", "distilled"):
        assert f"name: {study}/sft/export" in (study / name / "config.yaml").read_text()
    names = [cluster.show(job)["JobName"] for job in jobs]
    assert names == ["study-sft", "study-reward", "study-distilled"]


@pytest.mark.slow
def test_a_stage_may_be_another_command_whose_tasks_share_the_work(cluster, rows, tmp_path):
    study, out = tmp_path / "study", tmp_path / "answers.jsonl"
    sft = "--model ptl.objectives.sft.SFT "
    said = script(
        cluster, "slurm/pipeline.sh", "--sbatch", f"--output={cluster.folder}/job-%j.out", str(study),
        "sft=" + sft + words(rows, "rows.jsonl", policy=True),
        f"asked@2=ptl synth candidates {rows}/rows.jsonl --model {{sft}} --out {out} --k 2 --max-new-tokens 4 "
        "--keep-unfinished",
        "again=" + sft + words(rows, "rows.jsonl"),
    )  # fmt: skip
    jobs = [int(number) for number in re.findall(r"job (\d+)", said)]
    assert [cluster.wait(job, seconds=600) for job in jobs] == ["COMPLETED"] * 3, [cluster.output(j) for j in jobs]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert answers and all(row["completions"] for row in answers)
    logs = {log.name: log.read_text() for log in (study / "asked/slurm/latest/").glob("rank*.log")}
    assert sorted(logs) == ["rank0.log", "rank1.log"]
    # So few prompts are one share, which one task answers: the other waits, or finds it done.
    assert any(" answers to " in log for log in logs.values())
    assert all(" answers to " in log or "waits for other processes" in log for log in logs.values())
    assert not (study / "asked/config.yaml").exists()
    assert f"name: {study}/sft/export" in (study / "again/config.yaml").read_text()  # the last that has a model


def test_a_failing_stage_cancels_what_depends_on_it(cluster, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 2\n")  # as ptl ends for a mistake
    python.chmod(0o755)
    said = script(
        cluster, "slurm/pipeline.sh", "--sbatch", f"--output={cluster.folder}/job-%j.out", str(tmp_path / "study"),
        "sft=-c wrong.yaml", "next=-c never.yaml", "last=-c never.yaml", PTL_PYTHON=str(python),
    )  # fmt: skip
    first, second, third = [int(number) for number in re.findall(r"job (\d+)", said)]
    assert cluster.wait(first) == "FAILED"
    assert cluster.wait(second) == "CANCELLED" and cluster.wait(third) == "CANCELLED"
    assert not (tmp_path / "study/next").exists()


def test_a_stage_without_the_export_that_it_needs_does_not_start(cluster, tmp_path):
    job = cluster.submit(
        "slurm/train.sbatch", "--run.dir", str(tmp_path / "run"), PTL_NEEDS=str(tmp_path / "sft/stage.json")
    )
    assert cluster.wait(job) == "FAILED"
    assert "sft/stage.json is missing: the stage before has exported nothing" in cluster.output(job)


@pytest.mark.slow
def test_a_sweep_runs_each_line_once(cluster, rows, tmp_path):
    listed = tmp_path / "lrs.txt"
    listed.write_text("# rates\n" + "".join(f"--model.optimizer.lr {lr}\n" for lr in ("1e-2", "1e-3")))
    common = words(rows, "rows.jsonl", policy=True).replace("--model.optimizer.lr 1e-3", "").split()
    said = script(
        cluster, "slurm/sweep.sbatch", "--at-once", "1", "--sbatch", f"--output={cluster.folder}/job-%A.out",
        str(listed), "--model", "ptl.objectives.sft.SFT", *common, "--run.dir", str(tmp_path / "runs"),
    )  # fmt: skip
    listed.write_text("--model.optimizer.lr 7\n")  # the sweep keeps what was submitted
    job = int(said.split()[-1])
    states = {cluster.wait(f"{job}_{task}", seconds=600) for task in range(2)}
    assert states == {"COMPLETED"}, cluster.output(job)
    rates = [re.search(r"lr: (\S+)", (tmp_path / f"runs/{task}/config.yaml").read_text()) for task in range(2)]
    assert [float(rate[1]) for rate in rates if rate] == [1e-2, 1e-3]


PROFILE = """
sbatch: {partition: main, time: "00:10:00", exclusive: true, nice: null}
srun: {mpi: none}
modules: [cuda/12.8]
environment: {NCCL_DEBUG: WARN}
container: {runtime: pyxis, image: /images/ptl.sqsh, mounts: [/data, /scratch]}
"""


def test_dry_run_says_what_would_be_submitted(cluster, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(PROFILE)
    options = ["--cluster", str(profile), "--dry-run"]
    said = script(cluster, "slurm/train.sbatch", *options, "--sbatch", "--nodes=2", "-c", "x.yaml")
    assert said.startswith("sbatch --parsable --partition=main --time=00:10:00 --exclusive --nodes=2 ")
    assert said.splitlines()[0].endswith("slurm/train.sbatch -c x.yaml ")
    assert "# srun_options=(--mpi=none --container-image=/images/ptl.sqsh --no-container-mount-home " in said
    assert "#   module load cuda/12.8" in said and "# export NCCL_DEBUG=WARN" in said
    said = script(cluster, "slurm/pipeline.sh", *options, "runs/study", "a@4=-c a.yaml", "b=-c b.yaml")
    assert "--nodes=4" in said and "--dependency=afterok:\\<job\\ of\\ a\\>" in said
    said = script(cluster, "slurm/rollout.sbatch", *options, "MODEL", "-c", "x.yaml", "--run.dir", "runs/x")
    assert "slurm/rollout.sbatch MODEL -c x.yaml --run.dir runs/x" in said
    assert not cluster.run("squeue", "--noheader").strip()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sbtach: {partition: x}", "unknown key sbtach; did you mean sbatch?"),
        ("sbatch: [x]", "sbatch must hold keys, got ['x']"),
        ("modules: cuda", "modules must be a list, got 'cuda'"),
        ("container: {runtime: docker, image: x}", "container needs a runtime, pyxis or apptainer"),
        ("[", "is not YAML"),
    ],
)
def test_a_wrong_profile_is_named(cluster, tmp_path, text, words):
    profile = tmp_path / "mine.yaml"
    profile.write_text(text)
    said = script(cluster, "slurm/train.sbatch", "--cluster", str(profile), "-c", "x.yaml", check=False)
    assert words in said and not cluster.run("squeue", "--noheader").strip()


def test_a_pipeline_names_a_stage_that_does_not_exist(cluster):
    said = script(cluster, "slurm/pipeline.sh", "runs/x", "a=-c a.yaml --model.policy.name {zero}", check=False)
    assert "a names {zero}, which is no earlier stage" in said


def test_scripts_are_clean():
    import shutil

    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    files = sorted(map(str, (ROOT / "slurm").iterdir()))
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert all(len(Path(file).read_text().splitlines()) < 120 for file in files)
