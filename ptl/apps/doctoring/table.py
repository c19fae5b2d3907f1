"""The reports of ranks and what is wrong with them, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ptl.apps.doctoring.judge import Finding

LIMITS = {"open_files": "open files", "locked_kib": "locked memory in KiB"}


def show(reports: Sequence[Mapping[str, Any]], found: Sequence[Finding]) -> None:
    """Prints hosts, devices and findings."""
    console = Console(highlight=False, soft_wrap=True)
    for report in {report["host"]: report for report in reversed(reports)}.values():
        console.print(host_line(report), markup=False)
    if reports:
        console.print(devices(reports))
    for finding in found:
        style = "red" if finding.level == "problem" else "yellow"
        console.print(f"{finding.level}: {finding.where}: {finding.text}", style=style, markup=False)
    problems = sum(finding.level == "problem" for finding in found)
    console.print("healthy" if not problems else f"{problems} problem{'s' * (problems > 1)}")


def host_line(report: Mapping[str, Any]) -> str:
    """A host's facts in a few lines."""
    versions, own = report["versions"], report["processors"]
    shown = ("python", "torch", "lightning", "deepspeed", "transformers", "ptl")
    words = [f"{name} {versions[name]}" for name in shown if name in versions]
    words += [f"CUDA {report['cuda']}"] if report["cuda"] else []
    words += [f"NCCL {report['nccl']}"] if report["nccl"] else []
    words += [f"driver {report['gpus'][0]['driver']}"] if report["gpus"] else []
    allowed = f", control group {own['cgroup']:g}" if own["cgroup"] else ""
    cores = f"{own['affinity']} of {own['machine']} processors{allowed}, load {own['load']}"
    disks = ", ".join(f"{name} {disk['free_gib']:.1f} GiB free" for name, disk in report["disks"].items())
    limits = ", ".join(f"{LIMITS[name]} {'no limit' if n is None else n}" for name, n in report["limits"].items())
    tools = ", ".join(f"{name} {path or 'none'}" for name, path in report["compiler"].items())
    rows = [" ".join((report["host"] + ":", ", ".join(words))), f"{own['name']}, {cores}", disks, limits, tools]
    return "\n  ".join(rows)


def devices(reports: Sequence[Mapping[str, Any]]) -> Table:
    """A row a device."""
    table = Table(box=None, pad_edge=False)
    ranks = any(report.get("rank") is not None for report in reports)
    names = [*(["rank"] if ranks else []), "host", "device", "free GiB", "fp32 TFLOP/s", "bf16 TFLOP/s", "memory GB/s"]
    names += ["intra GB/s", "all GB/s", "clock ms"] if ranks else []
    for name in names:
        table.add_column(name, justify="left" if name in ("host", "device") else "right")
    for report in reports:
        free = [gpu["free_gib"] for gpu in report["torch_gpus"]] or [report["processors"]["memory_available_gib"]]
        for rate, room in zip(report["rates"], free, strict=True):
            row = [str(report["rank"])] if ranks else []
            row += [report["host"], rate["name"] or rate["device"], "" if room is None else f"{room:.1f}"]
            row += [_rate(rate["fp32"]), _rate(rate["bf16"]), f"{rate['memory_bytes'] / 1e9:.1f}"]
            if ranks:
                reduced = report.get("all_reduce") or {}
                row += ["" if reduced.get(n) is None else f"{reduced[n] / 1e9:.2f}" for n in ("intra", "all")]
                row += [f"{1000 * report['clock_seconds']:+.1f}"]
            table.add_row(*row)
    return table


def _rate(rate: Mapping[str, Any]) -> str:
    share = rate["share_of_peak"]
    return f"{rate['flops'] / 1e12:.3g}" + (f" ({share:.0%} of peak)" if share is not None else "")
