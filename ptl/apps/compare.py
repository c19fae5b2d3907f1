"""``ptl compare RUN...``: runs side by side, from run folders, W&B's offline files and W&B's server."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptl.apps.comparing.runs import Run
    from ptl.apps.comparing.summary import Comparison

PAGE, PICTURE = "compare.html", "compare.png"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = argparse.ArgumentParser(
        prog="ptl compare",
        description="Runs side by side: configuration differences, metrics over seeds, throughput, cost, curves.",
        allow_abbrev=False,
    )
    top.add_argument("runs", nargs="*", metavar="RUN", help="run folders, W&B files and folders, parents and patterns")
    top.add_argument("--out", metavar="FOLDER", help="write compare.html, .png, .md, .csv and .json there")
    top.add_argument("--metric", nargs="+", action="extend", default=[], metavar="NAME", help="metrics to show")
    top.add_argument("--by", metavar="KEY", help="group by this configuration key alone")
    top.add_argument("--project", metavar="ENTITY/PROJECT", help="runs on the W&B server")
    top.add_argument(
        "--filter",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="of the project: group, tags, job_type, name, state, or a configuration key such as model.optimizer.lr",
    )
    top.add_argument("--report", action="store_true", help="write a W&B report into the project")
    top.add_argument("--price", type=float, metavar="AMOUNT", help="of one device for an hour")
    form = top.add_mutually_exclusive_group()
    for name in ("csv", "markdown", "json"):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=f"print {name}")
    top.epilog = (
        "Runs that differ in seeds alone are one group. Without --out nothing is written. "
        "Example: ptl compare runs/lr-* wandb/offline-run-* --metric val/loss --out comparison"
    )
    return top


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or after one line on stderr 1 where only W&B's server failed, else 2."""
    try:
        args = parser().parse_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return compare(args)
    except (ValueError, OSError) as mistake:
        if os.environ.get("PTL_TRACEBACK"):
            raise
        print(f"ptl compare: error: {mistake}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace) -> int:
    """Reads, compares, prints and writes.

    Returns:
        0, or 1 where W&B's server failed: what could be done without it is done.

    Raises:
        ValueError: no run is there, or an argument does not fit the runs.
    """
    from ptl.apps.comparing.configs import grouped
    from ptl.apps.comparing.gather import joined_runs
    from ptl.apps.comparing.summary import compared
    from ptl.apps.comparing.wandb_online import ServerError
    from ptl.apps.comparing.wandb_report import write_report

    _check(args)
    runs, missing = _read(args)
    runs, lines = joined_runs(runs)
    grouping = grouped(runs, args.by)
    comparison = compared(runs, grouping, metrics=args.metric, price=args.price)
    mixed = [f"Groups are by {args.by} alone: inside of them {', '.join(grouping.mixed)} vary"] * bool(grouping.mixed)
    away = [f"The runs of {args.project} are missing: W&B's server could not be read"] * bool(missing)
    comparison["notes"] = [*away, *lines, *_notes(runs), *mixed]
    _print(comparison, args.form)
    if args.out:
        _write(comparison, runs, Path(args.out).expanduser(), quiet=args.form is not None)
    trouble = missing
    if args.report and not missing:
        try:
            url = write_report(comparison, runs, args.project, mixed)
            print(f"report: {url}", file=sys.stderr if args.form else sys.stdout)
        except ServerError as problem:
            trouble = str(problem)
    if trouble:
        print(f"ptl compare: error: {trouble}", file=sys.stderr)
    return 1 if trouble else 0


def _check(args: argparse.Namespace) -> None:
    """Raises ``ValueError`` where arguments do not fit each other."""
    if args.price is not None and not (math.isfinite(args.price) and args.price >= 0):
        raise ValueError(f"--price got {args.price}, expected 0 or more: the price of one device for an hour")
    if not args.runs and not args.project:
        raise ValueError("got no run, expected run folders, W&B folders or --project ENTITY/PROJECT: name some")
    if args.filter and not args.project:
        raise ValueError("--filter got no server to ask, expected --project ENTITY/PROJECT beside it: add it")
    if args.report and not args.project:
        raise ValueError("--report got no online run, expected --project ENTITY/PROJECT beside it: add it")
    if args.report:
        from ptl.apps.comparing.wandb_report import need_workspaces

        need_workspaces()


def _read(args: argparse.Namespace) -> tuple[list[Run], str | None]:
    """The runs that the arguments name, with progress on a terminal, and why those of the server are missing."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    from ptl.apps.comparing.gather import find, read

    sources = find(args.runs)
    console, columns = Console(stderr=True), (TextColumn("reading runs"), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(sources))
        runs = read(sources, lambda count: progress.advance(task, count))
    if args.project:
        from ptl.apps.comparing.wandb_online import ServerError, read_project

        try:
            runs += read_project(args.project, args.filter)
        except ServerError as problem:
            if not runs:
                raise
            return runs, f"{problem}: its runs are left out" + ", and no report is written" * args.report
    return runs, None


def _notes(runs: Sequence[Run]) -> list[str]:
    bare = [run.name for run in runs if not run.config and run.status != "unreadable"]
    lost = [f"{run.where} cannot be read: {run.error}" for run in runs if run.status == "unreadable"]
    return [*([f"Without a configuration, each a group of its own: {', '.join(bare)}"] if bare else []), *lost]


def _print(comparison: Comparison, form: str | None) -> None:
    from ptl.apps.comparing.tables import csv_text, json_text, markdown, rich_table

    if form:
        text = {"csv": csv_text, "markdown": markdown, "json": json_text}[form](comparison)
        print(text.rstrip("\n"))
        return
    from rich.console import Console

    console = Console()
    console.print(rich_table(comparison, console.width))
    troubled = [run for run in comparison["runs"] if run["status"] not in ("finished", "stopped")]
    for run in troubled:
        reason = f": {' '.join(run['error'].split())}" if run["error"] else ""
        console.print(f"{run['name']} (group {run['group']}): {run['status']}{reason}", markup=False, highlight=False)
    for note in comparison["notes"]:
        console.print(note, markup=False, highlight=False)


def _write(comparison: Comparison, runs: Sequence[Run], folder: Path, *, quiet: bool) -> None:
    from ptl.apps.comparing.curves import draw
    from ptl.apps.comparing.page import html
    from ptl.apps.comparing.tables import csv_text, json_text, markdown
    from ptl.data.durable import replacing, write_text

    picture = PICTURE if comparison["shown"] else None  # runs without any metric have no curves
    if picture:
        with replacing(folder / picture) as temporary:
            draw(comparison, runs, temporary)
    write_text(folder / PAGE, html(comparison, runs))
    write_text(folder / "compare.md", markdown(comparison, picture))
    write_text(folder / "compare.csv", csv_text(comparison))
    write_text(folder / "compare.json", json_text(comparison) + "\n")
    if not quiet:
        print(f"open {folder / PAGE}; beside it {'compare.png, ' if picture else ''}compare.md, .csv and .json")
