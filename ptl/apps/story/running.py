"""Runs the stages, one command after the other, and keeps what each took; a story that was stopped goes on."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptl.apps.story.stages import Stage
from ptl.data.durable import write_text

LEDGER = "story.json"
SHOWN = 15
"""Lines of a command that failed."""
Ledger = dict[str, list[dict[str, Any]]]
"""A stage's name -> of each command that was done ``command``, ``seconds`` and ``peak_bytes``, its most memory."""


class StoryError(Exception):
    """A command ended with another code than 0; the text says which, and how it ended."""


def run_all(stages: Sequence[Stage], work: Path) -> Ledger:
    """Runs the commands that have not been run yet. What they print goes to ``work/logs``.

    Raises:
        StoryError: at the first command that fails; what was done before stays.
    """
    path = work / LEDGER
    ledger: Ledger = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    (work / "logs").mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(stages, 1):
        print(f"{number}/{len(stages)} {stage.title}", flush=True)
        done = ledger.setdefault(stage.name, [])
        if len(done) < len(stage.commands):
            stage.before()
        for command in stage.commands[len(done) :]:
            done.append(_run(command, work / "logs" / f"{stage.name}.log"))
            write_text(path, json.dumps(ledger, indent=1, ensure_ascii=False) + "\n")
    return ledger


def _run(command: str, log: Path) -> dict[str, Any]:
    print(f"    ptl {command}", flush=True)
    began = time.monotonic()
    words = [sys.executable, "-m", "ptl.cli", *shlex.split(command)]
    with log.open("ab") as out:
        child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _, status, usage = os.wait4(child.pid, 0)  # as Popen.wait, which does not say what the child used
        except BaseException:  # Ctrl-C: the command saves what it has and ends too
            child.terminate()
            child.wait()
            raise
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds, peak = time.monotonic() - began, usage.ru_maxrss * 1024
    if child.returncode:
        last = "\n".join(deque(log.read_text(encoding="utf-8", errors="replace").splitlines(), SHOWN))
        problem = f"this command ended with code {child.returncode}:\n  ptl {command}"
        raise StoryError(f"{problem}\nThe last lines of {log}:\n{last}")
    print(f"    {seconds:.0f} s, at most {peak / 1e9:.1f} GB", flush=True)
    return {"command": command, "seconds": round(seconds, 1), "peak_bytes": peak}
