"""What a run was made of: code, packages, machine. Facts only, chosen by name: the environment is never dumped."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.cuda import nccl

from ptl.callbacks.redact import redact

SCHEDULER_FACTS = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_CLUSTER_NAME",
)
RUNTIME_FACTS = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "WANDB_MODE",
    "WANDB_RUN_ID",
    "HF_HUB_OFFLINE",
    "NCCL_DEBUG",
)
MAX_DIFF_BYTES = 1_000_000
GIT_SECONDS = 15


def command_line() -> str:
    """The command that started this process, as a shell would take it, without secrets."""
    return redact(shlex.join([sys.executable, *sys.argv]))


def git_state(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The state of the git work tree around ``folder`` and its uncommitted changes as a diff.

    Returns:
        ``{"root", "commit", "branch", "dirty", "untracked"}``, or None where there is no work tree or no git, and the
        diff to the commit: at most ``MAX_DIFF_BYTES``, without secrets.
    """
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None:
        return None, ""
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    status = (_git(folder, "status", "--porcelain") or "").splitlines()
    diff = ""
    if commit and any(not line.startswith("??") for line in status):
        diff = _git(folder, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", strip=False) or ""
    if len(diff) > MAX_DIFF_BYTES:
        diff = diff[:MAX_DIFF_BYTES] + f"\n[cut: the diff has {len(diff)} characters]\n"
    state = {
        "root": root,
        "commit": commit,
        "branch": _git(folder, "symbolic-ref", "--short", "--quiet", "HEAD"),
        "dirty": bool(status),
        "untracked": [line[3:] for line in status if line.startswith("??")],
    }
    return state, redact(diff)


def _git(folder: Path, *arguments: str, strip: bool = True) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return done.stdout.strip() if strip else done.stdout


def versions() -> dict[str, Any]:
    """Python, CUDA and every installed package."""
    packages = dict(named for each in importlib.metadata.distributions() if (named := _named(each)))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "nccl": ".".join(map(str, nccl.version())) if torch.cuda.is_available() else None,
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _named(package: importlib.metadata.Distribution) -> tuple[str, str] | None:
    """Name and version. Taken from the text, for to parse the metadata of some hundred packages takes a second."""
    head = (package.read_text("METADATA") or package.read_text("PKG-INFO") or "").split("\n\n", 1)[0]
    fields = dict(line.split(": ", 1) for line in head.splitlines() if line.startswith(("Name: ", "Version: ")))
    return (fields["Name"].strip(), fields["Version"].strip()) if len(fields) == 2 else None


def environment(trainer: L.Trainer) -> dict[str, Any]:
    """The machine and the layout of the run: host, devices, ranks, strategy, scheduler ids."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = {name: os.environ[name] for name in (*SCHEDULER_FACTS, *RUNTIME_FACTS) if name in os.environ}
    return {
        "host": socket.gethostname(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": names,
        "world_size": trainer.world_size,
        "nodes": trainer.num_nodes,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "variables": {name: redact(value) for name, value in found.items()},
    }


def run_tags(spec: Any, sources: Iterable[str], strategy: Any) -> list[str]:
    """Tags of a run: model, data sets, strategy, adapter and quantisation, cluster.

    Args:
        spec: the policy's ``ModelSpec``.
        sources: labels of the training data.
        strategy: the trainer's.
    """
    stage = getattr(strategy, "stage", None)
    kind = f"zero{stage}" if stage is not None else type(strategy).__name__.removesuffix("Strategy").lower()
    made = [_short(spec.name), *map(_short, sources), kind, "lora" if spec.adapter is not None else "full"]
    made += [spec.quantize, os.environ.get("SLURM_CLUSTER_NAME")]
    return list(dict.fromkeys(tag for tag in made if tag))


def _short(name: str) -> str:
    """A hub name as it is; of a path and of an address what tells it apart."""
    return name if name.count("/") == 1 and not name.startswith((".", "/")) else Path(name.split("?")[0]).name


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None
