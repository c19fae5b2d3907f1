"""A real SLURM cluster of two nodes on this machine, on free ports, started and stopped by the tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from tests.ranks import EXTENSIONS, ROOT, compile_extensions

INSTALL = "apt-get install --no-install-recommends slurm-wlm"
DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
REQUEUED = ("starts again", "DUE TO JOB REQUEUE ***")
NODES = 2
CPUS = 4


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    lacking = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if not shutil.which(name)]
    if lacking:
        return f"SLURM is not installed ({', '.join(lacking)} missing): {INSTALL}"
    if os.getuid() != 0:
        return "slurmd needs root here"
    return None


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: its state, its logs and its configuration.
        environment: what commands and jobs need to reach it.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, env: Mapping[str, str] | None = None, check: bool = True, cwd: Path = ROOT) -> str:
        """A SLURM command's output; at most a minute."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.environment, **(env or {})}, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout + (done.stderr if not check else "")

    def submit(self, script: str | Path, *arguments: str, options: Sequence[str] = (), **env: str) -> int:
        """Submits a script from the project's folder; returns the job's number."""
        output = f"--output={self.folder}/job-%j.out"
        text = self.run("sbatch", "--parsable", output, *options, str(script), *arguments, env=env)
        return int(text.split(";")[0])

    def show(self, job: int | str) -> dict[str, str]:
        """What the controller knows of a job."""
        text = self.run("scontrol", "show", "job", str(job), check=False)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def output(self, job: int | str) -> str:
        """What the batch script has said."""
        path = self.folder / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: int | str, seconds: float = 600, states: set[str] = DONE) -> str:
        """Waits until the job is in one of the states; a requeued job is started at once, not in two minutes.

        Raises:
            AssertionError: it is not in time; with what the job has said.
        """
        deadline = time.monotonic() + seconds
        state, since = "", time.monotonic()
        while time.monotonic() < deadline:
            known = self.show(job)
            before, state = state, known.get("JobState", "")
            since = since if state == before else time.monotonic()
            # A job that is being requeued looks failed or cancelled for a while, longer on a busy machine.
            patience = 60 if self.output(job).rstrip().endswith(REQUEUED) else 4
            settled = state == "COMPLETED" or state not in DONE or time.monotonic() - since > patience
            if state in states and settled:
                return state
            self._start_at_once(job, known)
            time.sleep(0.3)
        raise AssertionError(f"job {job} is {state} after {seconds:.0f} s, expected {states}\n{self.output(job)}")

    def wait_requeued(self, job: int, seconds: float = 400, restarts: int = 1) -> None:
        """Waits until the job has been put back into the queue so many times; it stays there."""
        deadline = time.monotonic() + seconds
        while int(self.show(job).get("Restarts", 0)) < restarts:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} was not requeued within {seconds:.0f} s\n{self.output(job)}")
            time.sleep(0.1)

    def wait_said(self, job: int, words: str, seconds: float = 400) -> None:
        """Waits until the batch script has said something; a requeued job is started at once."""
        deadline = time.monotonic() + seconds
        while words not in self.output(job):
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} has not said {words!r} within {seconds:.0f} s\n{self.output(job)}")
            self._start_at_once(job, self.show(job))
            time.sleep(0.3)

    def _start_at_once(self, job: int | str, known: Mapping[str, str]) -> None:
        """Takes away the two minutes that SLURM lets a requeued job wait, but for three seconds.

        It revokes what a job was started with up to the second of the requeue: one that starts within it is killed.
        """
        if known.get("JobState") != "PENDING" or known.get("Reason") != "BeginTime":
            return
        if datetime.now() - datetime.fromisoformat(known["SubmitTime"]) > timedelta(seconds=3):
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def cancel_all(self) -> None:
        """Ends what runs."""
        self.run("scancel", "--user=root", check=False)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Starts a controller and two node daemons; stops them and their jobs at the end."""
    compile_extensions()
    ports = free_ports(1 + NODES)
    host = socket.gethostname().split(".")[0]
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder, host=host, port=ports[0], ports=_list(ports[1:])))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    foreign = ("SLURM", "SBATCH", "PTL_", "WANDB_SERVICE")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
        "PATH": path,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "MASTER_ADDR": "127.0.0.1",  # the nodes' names do not resolve
        "PTL_MASTER_ADDR": "127.0.0.1",
        "PTL_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }
    cluster = Cluster(folder, environment)
    daemons = [_start(cluster, ["slurmctld", "-D", "-c"], "ctld")]
    try:
        for number in range(1, NODES + 1):
            (folder / f"spool-n{number}").mkdir()
            daemons.append(_start(cluster, ["slurmd", "-D", "-N", f"n{number}"], f"n{number}"))
        _await_idle(cluster)
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            cluster.cancel_all()
            _await_empty(cluster)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _start(cluster: Cluster, command: list[str], name: str) -> subprocess.Popen[bytes]:
    with (cluster.folder / f"{name}.out").open("wb") as output:
        return subprocess.Popen(
            command,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """A test process that is killed takes its cluster along."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _await_idle(cluster: Cluster) -> None:
    deadline = time.monotonic() + 30
    said = ""
    while time.monotonic() < deadline:
        said = cluster.run("sinfo", "--noheader", "--format=%D %t", check=False)
        if said.split() == [str(NODES), "idle"]:
            return
        time.sleep(0.2)
    logs = "".join(path.read_text(errors="replace")[-2000:] for path in cluster.folder.glob("*.out"))
    raise AssertionError(f"the cluster did not come up: {said}\n{logs}")


def _await_empty(cluster: Cluster) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and cluster.run("squeue", "--noheader", check=False).strip():
        time.sleep(0.2)


def _list(ports: Sequence[int]) -> str:
    return ",".join(map(str, ports))


_CONFIG = f"""\
ClusterName=ptl
SlurmctldHost={{host}}(127.0.0.1)
SlurmctldPort={{port}}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={{folder}}/state
SlurmdSpoolDir={{folder}}/spool-%n
SlurmctldPidFile={{folder}}/ctld.pid
SlurmdPidFile={{folder}}/slurmd-%n.pid
SlurmctldLogFile={{folder}}/ctld.log
SlurmdLogFile={{folder}}/slurmd-%n.log
MpiDefault=none
SwitchType=switch/none
KillWait=5
MinJobAge=3000
SchedulerParameters=sched_interval=1,bf_interval=2,batch_sched_delay=0
NodeName=n[1-{NODES}] NodeHostname={{host}} NodeAddr=127.0.0.1 Port=[{{ports}}] CPUs={CPUS} RealMemory=8000
PartitionName=main Nodes=n[1-{NODES}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
