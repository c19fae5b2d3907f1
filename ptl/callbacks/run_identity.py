"""Who a run is: an id of its own in its folder, which its checkpoints and its W&B run carry."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import string
from pathlib import Path

IDENTITY_FILE = "run.json"
_LETTERS = string.ascii_lowercase + string.digits


def trial_id() -> str | None:
    """The id that an agent of a W&B sweep has given to the run of this process; None where no agent has started it."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def run_id(run_dir: str | os.PathLike[str]) -> str | None:
    """The id of the run in a folder; None where no run has begun."""
    try:
        return json.loads((Path(run_dir) / IDENTITY_FILE).read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_run_id(run_dir: str | os.PathLike[str]) -> str:
    """The id of the run in a folder, made where it has none: a sweep's, or eight letters and digits, as W&B's are.

    Of several processes that make one at the same time all get the same.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if known := run_id(folder):
        return known
    made = trial_id() or "".join(secrets.choice(_LETTERS) for _ in range(8))
    temporary = folder / f".{IDENTITY_FILE}.{made}"
    temporary.write_text(json.dumps({"id": made}) + "\n", encoding="utf-8")
    try:
        # A link, unlike a rename, fails where another process was first.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, folder / IDENTITY_FILE)
    except OSError:  # a file system without hard links
        os.replace(temporary, folder / IDENTITY_FILE)
    temporary.unlink(missing_ok=True)
    return run_id(folder) or made
