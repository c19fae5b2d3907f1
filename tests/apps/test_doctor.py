"""What the doctor finds: judged on reports, and on this machine for real, alone and with two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from ptl.apps import doctor
from ptl.apps.doctoring.judge import findings
from ptl.apps.doctoring.machine import cgroup_cores, code_digest, facts, parse_gpus, stale_locks
from ptl.apps.doctoring.ranks import place
from ptl.cli import main
from tests import forks
from tests.apps.doctor_parts import SMI, healthy
from tests.ranks import ROOT, free_port


def texts(reports, **how):
    return [f"{finding.level}: {finding.where}: {finding.text}" for finding in findings(reports, **how)]


# ---- judging ----


def test_equal_ranks_are_healthy():
    assert texts(healthy()) == [] and texts(healthy(1)) == []


def test_a_slow_rank_is_named_with_its_host():
    reports = healthy()
    reports[2]["rates"][0]["fp32"]["flops"] *= 0.79
    (found,) = texts(reports)
    assert found.startswith("problem: n2, rank 2, cpu: products in fp32: 0.79 of the median")
    reports[2]["rates"][0]["fp32"]["flops"] = 0.81e12
    assert texts(reports) == []


def test_the_slower_of_two_ranks_is_the_slow_one():
    reports = healthy(2, per_host=1)
    reports[0]["rates"][0]["memory_bytes"] /= 2
    (found,) = texts(reports)
    assert "n1, rank 0, cpu: copies in memory: 0.50" in found


def test_versions_that_differ_are_named_with_their_hosts():
    reports = healthy()
    for report in reports[2:]:
        report["versions"]["torch"] = "2.12.0"
        report["versions"]["kernel"] = "6.2.0"
        del report["versions"]["ptl code"]
    found = texts(reports)
    assert "problem: all: torch differs: 2.13.0 on n1; 2.12.0 on n2" in found
    assert "problem: all: ptl code differs: 0123456789ab on n1; none on n2" in found
    assert found[-1] == "warning: all: kernel differs: 6.1.0 on n1; 6.2.0 on n2"


def test_missing_ranks_clocks_and_failed_collectives_are_problems():
    reports = healthy()
    reports[1]["clock_seconds"] = -2.5
    reports[3]["error"] = "all-reduce failed: connection refused"
    found = texts(reports, missing=[4], waited=30.0)
    assert "problem: rank 4: did not come within 30 s: look at its node, its log and MASTER_ADDR" in found
    assert any("n1, rank 1: its clock is 2.50 s behind rank 0's" in text for text in found)
    assert "problem: n2, rank 3: all-reduce failed: connection refused" in found


def test_a_slow_host_inside_is_said_once():
    reports = healthy(6)
    for report in reports[4:]:
        report["all_reduce"]["intra"] /= 3
    (found,) = texts(reports)
    assert found.startswith("problem: n3: all-reduce inside a host: 0.33")


def test_what_is_the_hosts_is_said_once_for_its_ranks():
    reports = healthy(2)
    for report in reports:
        report["disks"]["/tmp"]["free_gib"] = 0.5
        report["disks"]["HF cache"]["writable"] = False
        report["limits"] = {"open_files": 256, "locked_kib": 8192}
        report["infiniband"] = True
        report["compiler"]["ninja"] = None
        report["processors"] |= {"affinity": 64, "cgroup": 4.0, "threads": None}
        report["stale_locks"] = ["/cache/cpu_adam/lock"]
        report["hub"] = "https://huggingface.co: refused"
    found = texts(reports)
    assert len(found) == 8 and len([text for text in found if text.startswith("problem")]) == 4
    for part in ("/tmp has 0.5 GiB free", "ulimit -n", "InfiniBand", "the hub cannot be reached"):
        assert any(part in text for text in found[:4]), part
    for part in ("HF cache", "no ninja", "allows 4 of the 64 processors", "/cache/cpu_adam/lock"):
        assert any(part in text for text in found[4:]), part


def test_a_gpus_faults_are_read_and_judged():
    gpus = parse_gpus(SMI)
    assert gpus is not None and [gpu["ecc_uncorrected"] for gpu in gpus] == [0, 2]
    assert gpus[0]["name"] == "NVIDIA H100 80GB HBM3" and gpus[0]["driver"] == "570.86.15"
    assert gpus[0]["slowed_by"] == [] and gpus[1]["slowed_by"] == ["hw_thermal_slowdown"]
    assert parse_gpus("NVIDIA-SMI has failed") is None
    report = healthy(1)[0] | {"gpus": gpus, "cuda": "12.8", "xids": ["NVRM: Xid (PCI:0000:2a:00): 79"]}
    found = texts([report])
    assert not any("GPU 0" in text for text in found)
    problems = [text for text in found if text.startswith("problem")]
    assert [any(part in text for text in problems) for part in ("uncorrected", "replaced", "clock", "torch")] == [
        True
    ] * 4
    report["rates"][0]["bf16"]["share_of_peak"] = 0.3
    assert any("reaches 30% of its peak" in text for text in texts([report]))


# ---- this machine ----


def test_the_facts_of_this_machine():
    found = facts()
    assert found["versions"]["torch"] and found["processors"]["affinity"] >= 1
    assert found["disks"]["working folder"]["total_gib"] >= found["disks"]["working folder"]["free_gib"] > 0


def test_the_control_group_that_allows_least_counts(tmp_path):
    own = tmp_path / "slurm" / "job"
    own.mkdir(parents=True)
    (own / "cpu.max").write_text("max 100000\n")
    (tmp_path / "slurm" / "cpu.max").write_text("350000 100000\n")
    (tmp_path / "cpu.max").write_text("800000 100000\n")
    assert cgroup_cores(tmp_path, "0::/slurm/job\n") == 3.5
    assert cgroup_cores(tmp_path / "none", "0::/\n") is None


def test_old_locks_are_stale_and_new_ones_are_not(tmp_path):
    for name in ("old", "new"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
        (tmp_path / "py311_cpu" / name / "lock").touch()
    hour = time.time() - 3600
    os.utime(tmp_path / "py311_cpu/old/lock", (hour, hour))
    assert stale_locks(tmp_path) == [str(tmp_path / "py311_cpu/old/lock")]


def test_the_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    first = code_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = code_digest(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({first, second, code_digest(tmp_path)}) == 3


# ---- ranks ----


def test_the_launchers_variables_say_where_a_rank_stands():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert place(torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).hosted
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"}
    here = place(slurm | {"SLURM_LOCALID": "0", "MASTER_ADDR": "n1", "SLURM_NTASKS": "16"})
    assert (here.rank, here.world, here.local, here.address, here.hosted) == (1, 2, 0, "n1", False)
    other = place(slurm | {"MASTER_ADDR": "n1", "SLURM_STEP_ID": "1"})
    assert other.port != here.port
    assert place(slurm | {"SLURM_STEP_NODELIST": "gpu[07-09,12]"}).address == "gpu07"
    with pytest.raises(ValueError, match=r"MASTER_ADDR"):
        place({"RANK": "0", "WORLD_SIZE": "2"})


COMMAND = ("-m", "ptl.cli", "doctor", "--distributed", "--quick")


def variables(port, rank, world):
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    return env | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def started(port, rank, world, *words):
    return forks.begin([*COMMAND, *words], variables(port, rank, world), cwd=ROOT, parity=rank)


def ended(processes):
    try:
        return [(done.stdout, done.stderr, done.returncode) for done in (p.finish(timeout=100) for p in processes)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.timeout(120)
def test_two_ranks_are_compared_and_rank_0_reports(tmp_path):
    port, path = free_port(), tmp_path / "report.json"
    (said, errors, code), (other, _, other_code) = ended(
        [started(port, 0, 2, "--json", str(path)), started(port, 1, 2, "--json", str(path))]
    )
    found = json.loads(path.read_text())
    assert [report["rank"] for report in found["reports"]] == [0, 1], errors
    assert code == (0 if found["healthy"] else 1) and other_code == 0 and other == ""
    for report in found["reports"]:
        assert report["rates"][0]["fp32"]["flops"] > 1e6 and report["rates"][0]["memory_bytes"] > 1e6
        assert report["all_reduce"]["intra"] > 1e6 and report["all_reduce"]["all"] > 1e6
        assert abs(report["clock_seconds"]) < 1  # both read one clock
    assert not [f for f in found["findings"] if "differs" in f["text"] or "failed" in f["text"]]
    assert "all GB/s" in said


@pytest.mark.timeout(120)
def test_a_rank_that_does_not_come_is_named_in_bounded_time(tmp_path):
    port, path = free_port(), tmp_path / "report.json"
    wait = ("--wait", "5")
    (said, errors, code), (_, _, other) = ended(
        [started(port, 0, 3, *wait, "--json", str(path)), started(port, 1, 3, *wait)]
    )
    assert code == 1 and other == 0, errors
    assert "problem: rank 2: did not come within 5 s" in said
    assert "all_reduce" not in json.loads(path.read_text())["reports"][0]


@pytest.mark.timeout(60)
def test_a_rank_without_rank_0_says_so_in_bounded_time():
    # A real process: it hushes torch's own words before it imports torch.
    command, env = [sys.executable, *COMMAND, "--wait", "2"], variables(free_port(), 1, 2)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("ptl doctor: rank 1 on ") and "within 2 s" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the command ----


def test_alone_it_judges_this_machine(tmp_path, capsys):
    code = doctor.main(["--quick", "--json", str(tmp_path / "report.json")])
    found = json.loads((tmp_path / "report.json").read_text())
    assert code == (0 if found["healthy"] else 1) and len(found["reports"]) == 1
    assert "fp32 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distributed"], "got --distributed without ranks"),
        (["--json", "/nowhere/report.json"], "expected a file in a folder that exists: make /nowhere"),
        (["--wait", "soon"], "got 'soon', expected a number of seconds above 0"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistakes_are_one_line_and_code_2(words, message, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("ptl doctor: error: ") and message in last
