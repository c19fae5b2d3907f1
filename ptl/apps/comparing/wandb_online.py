"""Runs on a W&B server, read through W&B's public API: every row of their history, not a sample of it."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil

from ptl.apps.comparing.configs import text_of
from ptl.apps.comparing.rows import joined, metrics_of
from ptl.apps.comparing.runs import UNFINISHED, Online, Run
from ptl.apps.comparing.wandb_files import STEP, block_of, need_wandb, wandb_run

SERVER_KEYS = {"group": "group", "job_type": "jobType", "name": "displayName", "state": "state", "tags": "tags"}
"""Filters that the server applies, and what it calls them; any other is a configuration key, applied here."""
LONGEST_END_S = 15
"""Seconds that W&B's service process has to end once the command has said all: it only read."""
SERVICE = "wandb-core"
_STATES = {"finished": "finished", "failed": "failed", "crashed": "failed", "killed": "interrupted"}


class ServerError(ValueError):
    """W&B's server cannot be reached, or refuses what it is asked."""


def parse_filters(filters: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Filters for the server and configuration keys with the text of their value; several tags are all needed.

    Raises:
        ValueError: a filter is no ``KEY=VALUE``.
    """
    asked: dict[str, Any] = {}
    config: dict[str, str] = {}
    for text in filters:
        key, sign, value = text.partition("=")
        if not sign or not key or not value:
            raise ValueError(f"--filter got {text}, expected KEY=VALUE, as in group=study: write it so")
        if key == "tags":
            asked.setdefault("$and", []).append({"tags": {"$in": [value]}})
        elif key in SERVER_KEYS:
            asked[SERVER_KEYS[key]] = value
        else:
            config[key.removeprefix("config.")] = value
    return asked, config


def read_project(project: str, filters: Sequence[str]) -> list[Run]:
    """Reads the runs of a project that filters name.

    Raises:
        ServerError: the server cannot be reached or refuses.
        ValueError: a filter is malformed, wandb is missing, or the server has no such run.
    """
    asked, config = parse_filters(filters)
    if project.count("/") != 1 or not all(project.split("/")):
        raise ValueError(f"--project got {project}, expected ENTITY/PROJECT: change it")
    need_wandb()
    import wandb

    try:
        found = wandb.Api().runs(project, filters=asked or None, per_page=100, lazy=False)
        runs = [run for each in found if (run := _read(each, project, config)) is not None]
    except (wandb.Error, ValueError, OSError) as problem:
        kind = ValueError if isinstance(problem, ValueError) else ServerError
        raise kind(f"--project got {project}, which cannot be read from W&B: {one_line(problem)}") from problem
    finally:
        atexit.register(_end_in_time)  # after W&B's own, so that it runs before
    if not runs:
        named = f" with {' '.join(filters)}" if filters else ""
        raise ValueError(f"--project got {project}, expected runs{named}: there is none; change --project or --filter")
    return runs


def _end_in_time() -> None:
    """Bounds the end of W&B's service process, which W&B waits for without a limit, even while that retries."""

    def end(*_: object) -> None:
        for child in psutil.Process().children():
            if child.name() == SERVICE:
                child.kill()

    signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST_END_S)


def _read(each: Any, project: str, config: dict[str, str]) -> Run | None:
    """One run with its history, or None where its configuration is another than what is asked for."""
    summary = dict(each.summary_metrics)
    state = str(each.state)
    common = {
        "name": each.name or "",
        "where": f"{project}/{each.id}",
        "source": "online",
        "status": str(summary.get("run/status") or "finished")
        if state == "finished"
        else _STATES.get(state, UNFINISHED),
        "wandb_id": each.id,
    }
    settings = dict(each.config)
    flat = wandb_run(settings, summary, {}, **common).config
    if any(key not in flat or text_of(flat[key]) != value for key, value in config.items()):
        return None
    rows = _history(each)
    axis = STEP if any(STEP in row for row in rows) else "_step"
    run = wandb_run(settings, summary, metrics_of(joined([block_of(rows)])), **common)
    return replace(run, online=Online(each.id, axis))


def _history(each: Any) -> list[dict[str, float]]:
    """The numbers of every row that the run has logged, each row once and in order.

    W&B exports long histories as parquet files, which its client downloads; only what came later is asked for in pages.
    """
    # Not through W&B's cache, which knows a file by its place in the list of an export alone: a run that has gone on
    # since would end where it ended then. By step, because a page across the end of the export has rows of both.
    rows = {row["_step"]: row for row in each.scan_history(use_cache=False)}
    return [{name: float(v) for name, v in rows[step].items() if _is_number(v)} for step in sorted(rows)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")


def one_line(problem: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(problem).split()) or type(problem).__name__
