"""Configurations as flat keys, the keys that differ between runs, and the groups of runs that differ by seed alone."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ptl.apps.comparing.runs import Run

ABSENT = object()
"""The value of a key that a run's configuration lacks."""

_PLACES = re.compile(
    r"^(run|trainer\.(default_root_dir|logger)|ckpt_path|config|_wandb|wandb_version)(\.|$)"
    r"|(^|\.)(cache_dir|save_dir|log_dir|output_dir|dirpath|num_proc)$"
)
"""Where and how a run was kept, which says nothing of what it learned."""
_SECTION = re.compile(r"^(?=[^\s#\-])", re.M)
"""Where a key of the top level begins."""
_SEED = re.compile(r"(^|[._])seed(_everything)?$")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration but for their seeds.

    Attributes:
        config: value of each key that differs between groups; keys that the configuration lacks are absent.
        members: indices of the runs.
    """

    config: Mapping[str, Any]
    members: tuple[int, ...]


@dataclass(frozen=True)
class Grouping:
    """Groups in order of their first run.

    Attributes:
        keys: the keys that tell groups apart.
        seeds: seed keys that vary inside of them.
        mixed: other keys that vary inside of them, since the groups were asked for by one key.
    """

    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    seeds: tuple[str, ...]
    mixed: tuple[str, ...] = ()


def parse_config(text: str) -> dict[str, Any]:
    """The mapping that a resolved ``config.yaml`` holds, flat; empty where the text holds none."""
    import yaml

    try:
        # The runs of a study share most sections to the letter.
        return {key: value for part in _SECTION.split(text) for key, value in _section(part).items()}
    except yaml.YAMLError:
        pass
    try:
        return _load(text)
    except yaml.YAMLError:
        return {}


@lru_cache(maxsize=4096)
def _section(text: str) -> dict[str, Any]:
    return _load(text)


def _load(text: str) -> dict[str, Any]:
    import yaml

    value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return flatten(value) if isinstance(value, dict) else {}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"init_args": {"b": [{"c": 1}]}}}`` as ``{"a.b.0.c": 1}``: keys as the command line takes them.

    ``init_args`` is left out of keys, and ``class_path`` gives the value of the key above it. A list of plain values
    stays one value.
    """
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if prefix and name in ("init_args", "class_path"):
            key = prefix
        else:
            key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, key))
        else:
            out[key] = None if isinstance(value, Mapping) else value
    return out


def run_digest(text: str, config: Mapping[str, Any]) -> str | None:
    """Digest of a configuration's text that names its run folder; else None, as reruns would share it."""
    return hashlib.sha256(text.strip().encode()).hexdigest() if text and config.get("run.dir") else None


def is_seed(key: str) -> bool:
    """Whether a key holds a seed: ``seed_everything``, ``data.seed``, ``random_seed``."""
    return bool(_SEED.search(key))


def text_of(value: Any) -> str:
    """A value of a configuration as one line of text."""
    if value is ABSENT:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def grouped(runs: Sequence[Run], by: str | None = None) -> Grouping:
    """Groups runs whose configurations differ in seeds alone, or that have the same value of the key ``by``.

    A run without a configuration is a group of its own.

    Raises:
        ValueError: no run's configuration has the key ``by``.
    """
    known = [run.config for run in runs if run.config]
    if by is not None and not any(by in config for config in known):
        near = difflib.get_close_matches(by, sorted({key for config in known for key in config}), n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"--by got {by}, expected a key of the runs' config.yaml, as in model.optimizer.lr{hint}")
    varied = differing(known)
    plain = [key for key in varied if not is_seed(key)]
    keys = [by] if by else plain
    members: dict[tuple[str, ...], list[int]] = {}
    for index, run in enumerate(runs):
        values = tuple(_comparable(run.config.get(key, ABSENT)) for key in keys) if run.config else (f"run {index}",)
        members.setdefault(values, []).append(index)
    groups = tuple(
        Group({key: runs[found[0]].config[key] for key in keys if key in runs[found[0]].config}, tuple(found))
        for found in members.values()
    )
    seeds = tuple(key for key in varied if is_seed(key) and key != by)
    return Grouping(groups, tuple(keys), seeds, tuple(key for key in plain if key not in keys))


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that do not have one value in all of the configurations, in the order of the configurations."""
    first: dict[str, Any] = {}
    count: dict[str, int] = {}
    varied: set[str] = set()
    for config in configs:
        for key, value in config.items():
            count[key] = count.get(key, 0) + 1
            if key in varied or (key not in first and _PLACES.search(key)):
                continue
            other = first.setdefault(key, value)
            same = type(other) is type(value) and other == value  # a quick way out: JSON is slow for 1,000 runs
            if not same and _comparable(other) != _comparable(value):
                varied.add(key)
    return [key for key in count if key in varied or (count[key] < len(configs) and not _PLACES.search(key))]


def _comparable(value: Any) -> str:
    """Text that is the same for equal values: 1 and 1.0 are."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is ABSENT else json.dumps(value, sort_keys=True, default=str)
