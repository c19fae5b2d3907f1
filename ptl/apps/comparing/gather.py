"""Finds the runs that arguments name, reads them on all cores, and joins what is one run in two places."""

from __future__ import annotations

import glob
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ptl.apps.comparing.folders import METRICS, is_run_folder, read_folder
from ptl.apps.comparing.runs import UNREADABLE, Run
from ptl.apps.comparing.wandb_files import need_wandb, read_wandb, run_id_of

_WORTH_A_POOL = 24e6
"""Bytes of logs that take longer to read than processes take to start."""
_WANDB_COST = 3
"""A byte of W&B's files takes so many times longer than one of ``metrics.jsonl``."""


@dataclass(frozen=True)
class Source:
    """What one run is read from: a run folder, or the W&B files of one run id."""

    folder: Path | None = None
    files: tuple[Path, ...] = ()

    def cost(self) -> float:
        """How long it takes to read, in bytes of ``metrics.jsonl``."""
        if self.folder is not None:
            return _size(self.folder / METRICS)
        return _WANDB_COST * sum(_size(path) for path in self.files)


def find(arguments: Sequence[str]) -> list[Source]:
    """The runs that paths, patterns and parent folders name, each once, in order.

    Raises:
        ValueError: an argument names no run.
    """
    folders: dict[Path, Path] = {}
    files: dict[str, dict[Path, Path]] = {}
    for argument in arguments:
        found = [hit for path in _matches(argument) for hit in _inside(path)]
        if not found:
            raise ValueError(
                f"got {argument}, expected a run folder, a W&B folder (offline-run-*), or a folder of such: "
                f"change the path ({'it holds no run' if Path(argument).exists() else 'it is not there'})"
            )
        for path in found:
            if path.suffix == ".wandb":
                files.setdefault(run_id_of(path), {})[path.resolve()] = path
            else:
                folders.setdefault(path.resolve(), path)
    return [
        *(Source(folder=path) for path in folders.values()),
        *(Source(files=tuple(fragments.values())) for fragments in files.values()),
    ]


def read(sources: Sequence[Source], done: Callable[[int], None] = lambda count: None) -> list[Run]:
    """Reads runs on all cores where that is quicker; ``done`` is called with 1 for each run that is read.

    A run that cannot be read stands in the result with the status ``unreadable``.
    """
    if any(source.files for source in sources):
        need_wandb()
    costs = [source.cost() for source in sources]
    workers = min(_cores(), len(sources))
    if sum(costs) < _WORTH_A_POOL or workers < 2:
        return _collect(map(read_one, sources), done)
    # Spawned, as a fork of a process with threads may hang; the largest first, so that no core ends alone.
    order = sorted(range(len(sources)), key=lambda i: -costs[i])
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        chunk = max(1, min(8, len(sources) // (4 * workers)))
        runs = _collect(pool.map(read_one, [sources[i] for i in order], chunksize=chunk), done)
    return [run for _, run in sorted(zip(order, runs, strict=True), key=lambda pair: pair[0])]


def read_one(source: Source) -> Run:
    """Reads one run, or says why it cannot be read."""
    try:
        return read_folder(source.folder) if source.folder else read_wandb(list(source.files))
    except (OSError, ValueError) as problem:
        where = source.folder or source.files[-1].parent
        kind = "folder" if source.folder else "wandb"
        return Run(name=where.name, where=str(where), source=kind, status=UNREADABLE, error=str(problem))


def joined_runs(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs with each one once, and a line for each that stood in two places.

    A run folder and W&B's copy of it have one id, or else one wall time to the last digit, or else one configuration
    with one run folder; what the folder says is kept, since it is exact for every row, and where the run stands on a
    server. Names are made unique.
    """
    kept: list[Run] = []
    lines = []
    for run in sorted(runs, key=lambda run: ("folder", "wandb", "online").index(run.source)):
        twin = next(_twins(run, kept), None) if run.source != "folder" else None
        if twin is None:
            kept.append(run)
        else:
            lines.append(f"{run.where} is the same run as {kept[twin].where}, which is shown")
            kept[twin] = replace(kept[twin], online=run.online or kept[twin].online)
    return unique_names(kept), lines


def _twins(run: Run, kept: Sequence[Run]) -> Iterator[int]:
    """Indices of the kept runs that are this one."""
    for i, other in enumerate(kept):
        if run.wandb_id and run.wandb_id == other.wandb_id:
            same = True
        elif run.wall is not None and other.wall is not None:
            same = run.wall == other.wall and run.step == other.step
        else:
            same = run.digest is not None and run.digest == other.digest
        if same:
            yield i


def unique_names(runs: Sequence[Run]) -> list[Run]:
    """The runs, where names are shared with more of the path before them, or a number where that is shared too."""
    depth, names = 1, [run.name for run in runs]
    while len(set(names)) < len(names) and depth < 4:
        depth += 1
        shared = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(Path(run.where).parts[-depth:]) if name in shared else name
            for run, name in zip(runs, names, strict=True)
        ]
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _collect(results: Iterable[Run], done: Callable[[int], None]) -> list[Run]:
    runs = []
    for run in results:
        runs.append(run)
        done(1)
    return runs


def _matches(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if path.exists() or not glob.has_magic(argument):
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]


def _inside(top: Path) -> Iterable[Path]:
    """Run folders and W&B files at or under a path; what lies inside a run folder is that run's."""
    if top.is_file():
        if top.suffix == ".wandb":
            yield top
        return
    for folder, below, names in os.walk(top):
        if is_run_folder(set(names)):
            yield Path(folder)
            below.clear()
            continue
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".wandb"))
        below[:] = sorted(name for name in below if not name.startswith("."))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
