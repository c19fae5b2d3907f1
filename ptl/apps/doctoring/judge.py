"""What is wrong, from reports alone: pure functions of what ranks have found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Report = Mapping[str, Any]

LEAST_FREE_GIB = {"working folder": 10.0, "/tmp": 2.0, "HF cache": 5.0, "/dev/shm": 0.25}
LEAST_OPEN_FILES = 1024
LEAST_SHARE_OF_PEAK = 0.5
LEAST_FREE_GPU = 0.9
LEAST_OF_MEDIAN = 0.8
MOST_SKEW = 1.0
"""Seconds between two hosts' clocks: checkpoints, locks and metrics are ordered by them."""
NETWORK_KINDS = ("nfs", "nfs4", "lustre", "cifs", "fuse.sshfs")


@dataclass(frozen=True)
class Finding:
    """Something to know.

    Attributes:
        level: ``problem`` makes a machine unhealthy; a ``warning`` does not.
        where: the host, and the rank or device where it is one's alone.
        text: what was seen, and what to do.
    """

    level: Literal["problem", "warning"]
    where: str
    text: str


def findings(reports: Sequence[Report], missing: Iterable[int] = (), *, waited: float = 0.0) -> list[Finding]:
    """Everything that is wrong with some ranks, problems first.

    Arguments:
        reports: of the ranks that came, in their order.
        missing: ranks that did not.
        waited: seconds that they were waited for.
    """
    found = [
        Finding(
            "problem", f"rank {rank}", f"did not come within {waited:.0f} s: look at its node, its log and MASTER_ADDR"
        )
        for rank in missing
    ]
    seen = set()
    for report in reports:
        if report["host"] not in seen:  # what is the host's is said once
            seen.add(report["host"])
            found += of_host(report)
        found += of_rank(report)
    found += between(reports)
    return sorted(found, key=lambda finding: finding.level)


def where(report: Report) -> str:
    """Host, and rank where there are several."""
    return report["host"] if report.get("rank") is None else f"{report['host']}, rank {report['rank']}"


def of_host(report: Report) -> list[Finding]:
    """What is wrong with a host."""
    host, found = report["host"], []

    def say(level: Literal["problem", "warning"], text: str) -> None:
        found.append(Finding(level, host, text))

    for name, disk in report["disks"].items():
        if not disk["writable"]:
            say("problem" if name != "HF cache" else "warning", f"{name} ({disk['path']}) cannot be written to")
        elif disk["free_gib"] < LEAST_FREE_GIB[name]:
            place = name if name == disk["path"] else f"{name} ({disk['path']})"
            change = "start the container with a larger --shm-size" if name == "/dev/shm" else "make room there"
            say("problem", f"{place} has {disk['free_gib']} GiB free, less than {LEAST_FREE_GIB[name]}: {change}")
    files = report["limits"].get("open_files")
    if files is not None and files < LEAST_OPEN_FILES:
        say("problem", f"only {files} open files are allowed: ulimit -n {LEAST_OPEN_FILES} or more")
    locked = report["limits"].get("locked_kib")
    if report["infiniband"] and locked is not None:
        say("problem", f"{locked} KiB of locked memory are too few for InfiniBand: ulimit -l unlimited")
    found += _processors(report)
    compiler = report["compiler"]
    for name in ("c++", "ninja"):
        if not compiler[name]:
            say("warning", f"no {name} is on the path: DeepSpeed cannot compile its optimizers and offloading")
    if report["stale_locks"]:
        say("warning", f"a killed build has left {', '.join(report['stale_locks'])}, for which torch waits: delete it")
    if report.get("hub"):
        say("problem", f"the hub cannot be reached, {report['hub']}: use local folders and HF_HUB_OFFLINE=1")
    found += _gpus(report)
    return found


def _processors(report: Report) -> list[Finding]:
    own, found = report["processors"], []
    affinity, allowed = own["affinity"], own["cgroup"]
    if affinity and allowed and allowed < affinity and not own["threads"]:
        text = f"its control group allows {allowed:g} of the {affinity} processors it sees"
        found.append(Finding("warning", report["host"], f"{text}: OMP_NUM_THREADS={max(1, int(allowed))}"))
    if affinity == 1 and (own["machine"] or 1) > 1 and report.get("rank") is not None:
        text = f"a rank may use 1 of {own['machine']} processors: set --cpus-per-task and SRUN_CPUS_PER_TASK"
        found.append(Finding("warning", report["host"], text))
    return found


def _gpus(report: Report) -> list[Finding]:
    host, found = report["host"], []
    for index, gpu in enumerate(report["gpus"] or []):
        at = f"{host}, GPU {index}"
        if gpu["ecc_uncorrected"]:
            text = (
                f"{gpu['ecc_uncorrected']} uncorrected memory errors since the driver was loaded: leave this node out"
            )
            found.append(Finding("problem", at, text))
        if gpu["row_remap_failed"]:
            found.append(Finding("problem", at, "a broken row of its memory could not be replaced: have it exchanged"))
        if gpu["row_remap_pending"]:
            found.append(Finding("warning", at, "a row of its memory is to be replaced: it needs a reset"))
        if gpu["slowed_by"]:
            found.append(
                Finding("problem", at, f"its clock is held down ({', '.join(gpu['slowed_by'])}): cooling, power")
            )
        if gpu["free_gib"] is not None and gpu["total_gib"] and gpu["free_gib"] < LEAST_FREE_GPU * gpu["total_gib"]:
            text = f"{gpu['free_gib']} of {gpu['total_gib']} GiB are free: another process has the rest"
            found.append(Finding("warning", at, text))
    if report["gpus"] and not report["torch_gpus"] and report.get("cuda_visible") != "":
        text = f"the driver shows {len(report['gpus'])} GPUs and torch {report['versions'].get('torch')} none"
        found.append(
            Finding("problem", host, f"{text} (built for CUDA {report['cuda']}): install torch for this driver")
        )
    if report["xids"]:
        found.append(Finding("warning", host, f"the kernel has noted GPU faults, last: {report['xids'][-1]}"))
    return found


def of_rank(report: Report) -> list[Finding]:
    """What is wrong with a rank's own device and network."""
    found = []
    for rate in report["rates"]:
        share = rate["bf16"]["share_of_peak"]
        if share is not None and share < LEAST_SHARE_OF_PEAK:
            text = (
                f"{rate['device']} reaches {share:.0%} of its peak in bf16: look at clocks, power and other processes"
            )
            found.append(Finding("problem", where(report), text))
    if report.get("error"):
        found.append(Finding("problem", where(report), report["error"]))
    return found


def between(reports: Sequence[Report]) -> list[Finding]:
    """What differs between ranks that should be alike."""
    found = []
    names = sorted({name for report in reports for name in report["versions"]})
    for name in names:
        text = _differing(reports, lambda report, name=name: report["versions"].get(name, "none"))
        if text:
            level = "warning" if name == "kernel" else "problem"
            found.append(Finding(level, "all", f"{name} differs: {text}"))
    for title, get in (
        ("the driver", lambda report: (report["gpus"] or [{}])[0].get("driver")),
        ("CUDA", lambda report: report["cuda"]),
        ("NCCL", lambda report: report["nccl"]),
        ("the GPUs", lambda report: ", ".join(gpu["name"] for gpu in report["gpus"] or []) or "none"),
    ):
        if text := _differing(reports, get):
            found.append(Finding("problem", "all", f"{title} differs: {text}"))
    for report in reports:
        skew = report.get("clock_seconds")
        if skew is not None and abs(skew) > MOST_SKEW:
            text = (
                f"its clock is {abs(skew):.2f} s {'behind' if skew < 0 else 'ahead of'} rank 0's: start chrony or ntpd"
            )
            found.append(Finding("problem", where(report), text))
    for title, get in (
        ("products in fp32", lambda rate: rate["fp32"]["flops"]),
        ("products in bf16", lambda rate: rate["bf16"]["flops"]),
        ("copies in memory", lambda rate: rate["memory_bytes"]),
    ):
        values = [(f"{where(r)}, {rate['device']}", get(rate)) for r in reports for rate in r["rates"]]
        found += _slow(title, values)
    inside: dict[str, float] = {}  # all ranks of a reduction take equally long: it is the host's
    for report in reports:
        rate = (report.get("all_reduce") or {}).get("intra")
        if rate is not None:
            inside[report["host"]] = max(rate, inside.get(report["host"], 0.0))
    return found + _slow("all-reduce inside a host", list(inside.items()))


def _differing(reports: Sequence[Report], get: Callable[[Report], Any]) -> str:
    """``1.0 on a, b; 2.0 on c``; empty where all hosts are alike."""
    values: dict[Any, list[str]] = {}
    for report in reports:
        hosts = values.setdefault(get(report), [])
        if report["host"] not in hosts:
            hosts.append(report["host"])
    if len(values) < 2:
        return ""
    return "; ".join(
        f"{value} on {', '.join(hosts[:4])}{' and others' * (len(hosts) > 4)}" for value, hosts in values.items()
    )


def _slow(title: str, values: Sequence[tuple[str, float]]) -> list[Finding]:
    """Those below ``LEAST_OF_MEDIAN`` of the median; of two the faster one is the median."""
    if len(values) < 2:
        return []
    middle = statistics.median_high(value for _, value in values)
    return [
        Finding(
            "problem", at, f"{title}: {value / middle:.2f} of the median, so that all others wait for it: leave it out"
        )
        for at, value in values
        if value < LEAST_OF_MEDIAN * middle
    ]
