"""Folders that ptl itself chooses."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Where all that can be made again is kept: ``$PTL_CACHE``, else ``~/.cache/ptl``."""
    return Path(os.environ.get("PTL_CACHE") or "~/.cache/ptl").expanduser()
