"""``ptl doctor``: whether this machine, or every rank of a job, is fit to train."""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptl.apps.doctoring import machine
from ptl.apps.doctoring.judge import Finding, findings
from ptl.apps.doctoring.ranks import Meeting, Place, place


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        prog="ptl doctor",
        description=f"{__doc__} Exit code 0 healthy, 1 with problems, 2 after a mistake in the command.",
        allow_abbrev=False,
    )
    top.add_argument(
        "--distributed",
        action="store_true",
        help="compare all ranks of a job: `srun ptl doctor --distributed`, or under torchrun; rank 0 reports",
    )
    top.add_argument("--quick", action="store_true", help="measure for a tenth of the time")
    top.add_argument("--hub", action="store_true", help="also see whether the Hugging Face hub can be reached")
    top.add_argument("--json", metavar="FILE", type=Path, help="write everything as JSON")
    top.add_argument(
        "--wait", type=_seconds, default=60.0, metavar="SECONDS", help="for the other ranks (default %(default)s)"
    )
    return top


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of seconds above 0")
    return value


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns 0, 1 where something is wrong, or 2 after a user's mistake."""
    try:
        options = parser().parse_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if options.json and not options.json.parent.is_dir():
            raise ValueError(
                f"got --json {options.json}, expected a file in a folder that exists: make {options.json.parent}"
            )
        here = place() if options.distributed else None
    except ValueError as mistake:
        print(f"ptl doctor: error: {mistake}", file=sys.stderr)
        return 2
    try:
        return together(here, options) if here is not None else alone(options)
    except (ValueError, OSError) as trouble:
        print(f"ptl doctor: {trouble}", file=sys.stderr)
        return 1


def alone(options: argparse.Namespace) -> int:
    """This machine with all its devices."""
    report = examine(options, None)
    return conclude([report], findings([report]), options)


def together(here: Place, options: argparse.Namespace) -> int:
    """Every rank of a job. Only rank 0 judges, prints and ends with 1."""
    meeting = Meeting(here, socket.gethostname(), options.wait)
    clock = meeting.clock()
    meeting.together("ready")  # speeds are those of all ranks at once, as in a run
    report = {**examine(options, here), "rank": here.rank, "clock_seconds": round(clock, 6)}
    if not meeting.missing:
        report |= _reduced(meeting, report, options)
    meeting.say(f"report/{here.rank}", report)
    if here.rank != 0:
        meeting.hear("judged", 2 * options.wait + 60)
        meeting.say(f"left/{here.rank}", True)
        return 0
    reports = meeting.collect("report", meeting.hosts)
    lost = [rank for rank in range(here.world) if rank not in reports and rank not in meeting.missing]
    found = findings([reports[rank] for rank in sorted(reports)], meeting.missing, waited=options.wait)
    found = [Finding("problem", f"rank {rank}", "was lost while it measured: look at its log") for rank in lost] + found
    code = conclude([reports[rank] for rank in sorted(reports)], found, options)
    meeting.say("judged", code)
    meeting.say("left/0", True)
    meeting.collect("left", reports, 5.0)  # the store goes with this process
    return code


def examine(options: argparse.Namespace, here: Place | None) -> dict[str, Any]:
    """A report: facts and speeds of this machine, or of a rank's own device."""
    from ptl.apps.doctoring.speed import device_facts, rates

    report = {**machine.facts(), "cuda_visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    report |= device_facts(here.local if here else None)
    devices = [f"cuda:{gpu['index']}" for gpu in report["torch_gpus"]] or ["cpu"]
    seconds = 0.2 if options.quick else 2.0
    report["rates"] = [rates(device, seconds) for device in devices]
    report["hub"] = machine.hub() if options.hub else None
    return report


def _reduced(meeting: Meeting, report: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The speed of all-reduce, or why it failed."""
    from ptl.apps.doctoring.speed import reductions

    device = report["rates"][0]["device"]
    size = 2**30 if device != "cpu" else 2**26
    hosts = [meeting.hosts[rank] for rank in range(meeting.here.world)]
    size = size // 16 if options.quick else size
    try:
        found = reductions(meeting.store, meeting.here.rank, hosts, device, size=size, timeout=options.wait)
    except RuntimeError as error:
        return {"error": f"all-reduce failed: {' '.join(str(error).split())[:300]}"}
    return {"all_reduce": found}


def conclude(reports: Sequence[dict[str, Any]], found: Sequence[Finding], options: argparse.Namespace) -> int:
    """Shows and writes what was found; the exit code."""
    from ptl.apps.doctoring.table import show

    code = int(any(finding.level == "problem" for finding in found))
    show(reports, found)
    if options.json:
        whole = {"healthy": not code, "findings": [asdict(finding) for finding in found], "reports": list(reports)}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
