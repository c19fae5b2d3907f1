"""What the process that runs tools calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptl.rewards.worker import MOST_TEXT, imported


def run(job: tuple[str, Mapping[str, Any]]) -> str:
    """Calls the function at a dotted path with arguments by name; its answer as text, of which the start is enough."""
    path, arguments = job
    return str(imported(path)(**arguments))[:MOST_TEXT]
