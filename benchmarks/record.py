"""Results kept in the repository: one JSON line a measurement, appended to ``benchmarks/results/<name>.json``."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("ptl", "torch", "transformers", "lightning", "deepspeed", "peft", "datasets", "trl")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those of ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(kind: str = "cpu") -> str:
    """The accelerator's name, or the processor's name and the number of cores that this process may use."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {core_count()} cores"


def core_count() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process, as ``python -m package.module ...``.

    A path outside the working directory is written by its last part alone: where a file lies on one machine says
    nothing on another.
    """
    given = list(sys.argv if argv is None else argv)
    program = Path(given[0])
    root = Path(__file__).parent.parent
    if program.suffix == ".py" and program.resolve().is_relative_to(root):
        module = program.resolve().relative_to(root).with_suffix("")
        parts = module.parts[:-1] if module.name == "__main__" else module.parts
        head = ["python", "-m", ".".join(parts)]
    else:
        head = [program.name]
    return " ".join([*head, *(_portable(word) for word in given[1:])])


def _portable(word: str) -> str:
    flag, sep, value = word.partition("=") if word.startswith("-") else ("", "", word)
    path = Path(value)
    if path.is_absolute():
        here = Path.cwd()
        value = str(path.relative_to(here)) if path.is_relative_to(here) else path.name
    return flag + sep + value


def today() -> str:
    """Date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def append(name: str, result: Mapping[str, Any], *, device: str = "cpu", folder: Path = RESULTS) -> dict[str, Any]:
    """Adds the common keys to ``result``, appends it as one line to ``folder/name.json`` and returns the line.

    The common keys are ``benchmark`` (the name), ``device``, ``date`` (UTC, to the second), ``command`` and
    ``versions``; a key of the same name in ``result`` wins.

    Arguments:
        name: of the benchmark and of its file, without a suffix.
        result: what was measured; every value must be JSON.
        device: ``cpu`` or ``cuda``.
        folder: where the file is.

    Raises:
        ValueError: a value that is not JSON, NaN and infinity among them; nothing is written then.
    """
    line = {
        "benchmark": name,
        "device": device_name(device) if "device" not in result else None,
        "date": today(),
        "command": command(),
        "versions": versions(),
        **result,
    }
    try:
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the result of benchmark {name!r} is not JSON: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.json").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    return line


def read(name: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every line of ``folder/name.json``, oldest first; empty where there is no such file."""
    path = folder / f"{name}.json"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
