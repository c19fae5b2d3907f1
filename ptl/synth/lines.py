"""Files that a model writes over a long time: begun with settings that stay."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptl.data.mapped import published


def settle(path: Path, settings: Any) -> None:
    """Writes the settings, a dataclass, beside a new file; refuses to go on with a file that was begun with others.

    ``batch_tokens`` may change: it moves the last bits of the numbers and is what to lower when memory runs out.

    Raises:
        ValueError: other settings, or a file that has none beside it.
    """
    beside = path.with_name(path.name + ".settings.json")
    wanted = asdict(settings)
    if beside.is_file():
        found = json.loads(beside.read_text(encoding="utf-8"))
        names = [name for name in wanted if name != "batch_tokens" and found.get(name) != wanted[name]]
        if names:
            told = "; ".join(f"{name} {found.get(name)} against {wanted[name]}" for name in names)
            raise ValueError(f"{path} was begun with other settings ({told}): give another file, or delete {path}*")
    elif path.exists():
        raise ValueError(f"{path} is there and was not begun by this command: give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(beside) as partial:
        partial.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
