"""Facts of this machine, read without torch: versions, disks, limits, processors, compilers, and the driver's GPUs.

A fact that cannot be read is None; nothing here judges.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ptl

PACKAGES = (
    "ptl", "torch", "lightning", "deepspeed", "transformers", "accelerate", "peft", "datasets", "tokenizers",
    "bitsandbytes", "vllm", "wandb", "jsonargparse", "numpy", "safetensors",
)  # fmt: skip
_GIB = 2**30
_SECONDS = 20


def facts() -> dict[str, Any]:
    """Everything that is known of this machine without using it."""
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "disks": disks(),
        "limits": limits(),
        "processors": processors(),
        "compiler": compiler(),
        "stale_locks": stale_locks(),
        "gpus": gpus(),
        "xids": xids(),
        "infiniband": Path("/sys/class/infiniband").is_dir(),
    }


def versions() -> dict[str, str]:
    """Python, kernel, the packages that matter where they are installed, and a digest of this package's own code."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "ptl code": code_digest(Path(ptl.__file__).parent)}


def code_digest(folder: Path) -> str:
    """A digest of names and contents of all Python files under a folder: 12 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def disks() -> dict[str, dict[str, Any]]:
    """Free and whole GiB, and the file system's kind, of the places that a run writes to."""
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"working folder": Path.cwd(), "/tmp": Path("/tmp"), "HF cache": cache, "/dev/shm": Path("/dev/shm")}
    found = {}
    for name, path in places.items():
        here = path
        while not here.exists() and here != here.parent:
            here = here.parent
        if name == "/dev/shm" and here != path:
            continue
        usage = shutil.disk_usage(here)
        found[name] = {
            "path": str(path),
            "free_gib": round(usage.free / _GIB, 2),
            "total_gib": round(usage.total / _GIB, 2),
            "kind": _file_system(here),
            "writable": os.access(here, os.W_OK),
        }
    return found


def _file_system(path: Path) -> str | None:
    """The kind of the file system that holds a path, from the longest mount point above it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return None
    points = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    above = [(point, kind) for point, kind in points if path.resolve().is_relative_to(point)]
    return max(above, key=lambda pair: len(pair[0]))[1] if above else None


def limits() -> dict[str, int | None]:
    """Soft limits of this process: open files, and KiB of locked memory; None for no limit."""
    chosen = {
        "open_files": (resource.RLIMIT_NOFILE, 1),
        "locked_kib": (getattr(resource, "RLIMIT_MEMLOCK", None), 1024),
    }
    out: dict[str, int | None] = {}
    for name, (limit, unit) in chosen.items():
        if limit is not None:
            soft, _ = resource.getrlimit(limit)
            out[name] = None if soft == resource.RLIM_INFINITY else soft // unit
    return out


def processors() -> dict[str, Any]:
    """Processors of the machine, those that this process may run on, what its control group allows, and the load."""
    names = re.findall(r"^model name\s*: (.*)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    memory = re.search(r"MemAvailable:\s+(\d+)", _read("/proc/meminfo") or "")
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "machine": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cgroup": cgroup_cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": round(os.getloadavg()[0], 2),
        "memory_available_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
    }


def cgroup_cores(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> float | None:
    """Processors' worth of time that the control group allows; None for no limit.

    Arguments:
        root: where control groups are mounted.
        own: contents of ``/proc/self/cgroup``.
    """
    own = _read("/proc/self/cgroup") or "" if own is None else own
    unified = next((line[3:] for line in own.splitlines() if line.startswith("0::")), "/")
    folder = root / unified.lstrip("/")
    found = []
    while folder.is_relative_to(root):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            found.append(float(quota) / float(period))
        if folder == root:
            break
        folder = folder.parent
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota = int((root / "cpu/cpu.cfs_quota_us").read_text())
        if quota > 0:
            found.append(quota / int((root / "cpu/cpu.cfs_period_us").read_text()))
    return round(min(found), 2) if found else None


def compiler() -> dict[str, str | None]:
    """The C++ compiler, ninja and nvcc that DeepSpeed's extensions would be made with."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    names = {"c++": (os.environ.get("CXX", "c++"), "g++", "clang++"), "ninja": ("ninja",), "nvcc": ("nvcc",)}
    return {
        name: next(filter(None, (shutil.which(w, path=path) for w in wanted)), None) for name, wanted in names.items()
    }


def stale_locks(root: Path | None = None, *, minutes: float = 10.0) -> list[str]:
    """Locks of torch's extension builds that are older than any build should take.

    torch waits for such a file without end; one that a killed process has left makes every later build hang.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    root = Path(given) if root is None else root
    old = []
    for path in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 60 * minutes:
                old.append(str(path))
    return old


def gpus() -> list[dict[str, Any]] | None:
    """What ``nvidia-smi`` knows of each GPU; None where there is no such program or it fails."""
    text = _output(["nvidia-smi", "-q", "-x"])
    return None if text is None else parse_gpus(text)


def parse_gpus(text: str) -> list[dict[str, Any]] | None:
    """The GPUs in the XML that ``nvidia-smi -q -x`` writes; a value that the driver does not know is None."""
    try:
        top = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    driver = top.findtext("driver_version")
    found = []
    for gpu in top.iter("gpu"):
        volatile = [e for e in gpu.iterfind("ecc_errors/volatile/*") if "uncorrect" in e.tag]
        counts = [n for n in (_number(e.text) for e in volatile) if n is not None]
        reasons = [*gpu.iterfind("clocks_event_reasons/*"), *gpu.iterfind("clocks_throttle_reasons/*")]
        slow = sorted({re.sub(r"clocks_(event|throttle)_reasons?_", "", e.tag) for e in reasons if e.text == "Active"})
        found.append(
            {
                "name": gpu.findtext("product_name"),
                "driver": driver,
                "total_gib": _gib(gpu.findtext("fb_memory_usage/total")),
                "free_gib": _gib(gpu.findtext("fb_memory_usage/free")),
                "celsius": _number(gpu.findtext("temperature/gpu_temp")),
                "ecc_uncorrected": int(sum(counts)) if counts else None,
                "row_remap_failed": gpu.findtext("remapped_rows/remapped_row_failure") == "Yes",
                "row_remap_pending": gpu.findtext("remapped_rows/remapped_row_pending") == "Yes",
                "slowed_by": [name for name in slow if "hw_" in name or "thermal" in name or "power_brake" in name],
            }
        )
    return found


def xids() -> list[str] | None:
    """The kernel's last messages of GPU faults; None where its log may not be read."""
    text = _output(["dmesg"])
    return None if text is None else [line.strip() for line in text.splitlines() if "NVRM: Xid" in line][-5:]


def hub(timeout: float = 5.0) -> str | None:
    """Why the Hugging Face hub cannot be reached; None where it can."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=timeout):
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        return f"{address}: {getattr(error, 'reason', error)}"


def _output(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def _number(text: str | None) -> float | None:
    match = re.match(r"\s*(-?\d+(\.\d+)?)", text or "")
    return float(match[1]) if match else None


def _gib(text: str | None) -> float | None:
    value = _number(text)
    return None if value is None else round(value / 1024, 2)
