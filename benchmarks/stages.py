"""What benchmarks that run whole stages share: the commands of ptl."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def ptl(*words: str) -> float:
    """Runs a command of ptl and returns its seconds; stops all where it fails."""
    print("+ ptl", *words, flush=True)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "ptl.cli", *words])
    if done.returncode:
        raise SystemExit(done.returncode)
    return time.monotonic() - began


def fit(recipe: str, run: Path, source: dict[str, str], words: Sequence[str] = ()) -> float | None:
    """Trains on one source into a run folder and returns the minutes; None for a run that had ended before."""
    if (run / "export" / "config.json").exists():
        return None
    more = ["--data.train", json.dumps([source]), "--run.dir", str(run), *words]
    return round(ptl("fit", "-c", recipe, *more) / 60, 1)
