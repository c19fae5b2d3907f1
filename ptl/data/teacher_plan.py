"""What a part of a teacher's cache holds and how it is cut into files: all that its writer and its reader agree on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

VERSION = 1
SHARD_TOKENS = 1 << 16
"""Trained tokens after which a new shard starts; what a killed writer loses at most."""
PLAN, MANIFEST, ROWS = "plan.json", "manifest.json", "rows.safetensors"
Mode = Literal["topk", "sample"]


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What a part of a cache holds, and of what.

    Attributes:
        mode: ``topk`` or ``sample``.
        k: entries of a token, or draws.
        temperature: T of the softmax that the log-probabilities are of.
        teacher: digest of the teacher, see ``ptl.data.fingerprints``.
        teacher_name: as its user wrote it.
        tokenizer: ``ptl.models.vocabulary.vocabulary_fingerprint`` of the tokenizer.
        template: digest of the chat template.
        vocab: ids that the distribution is over; what a model's table has beyond them is cut.
        data: ``Contents.hash`` of the rows.
        seed: of the draws; 0 for ``topk``, which draws nothing.
        shard_tokens: see ``SHARD_TOKENS``.
        version: of the format.

    Raises:
        ValueError: a number out of its range.
    """

    mode: Mode
    k: int
    temperature: float
    teacher: str
    teacher_name: str
    tokenizer: str
    template: str
    vocab: int
    data: str
    seed: int = 0
    shard_tokens: int = SHARD_TOKENS
    version: int = VERSION

    def __post_init__(self) -> None:
        most = self.vocab if self.mode == "topk" else 65_535
        if not 1 <= self.k <= most:
            raise ValueError(f"--k must be from 1 to {most:,} in mode {self.mode}, got {self.k}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature must be above 0, got {self.temperature:g}")

    def differences(self, other: CachePlan) -> list[str]:
        """``key VALUE against OTHER VALUE`` of every key that matters and differs."""
        names = [field.name for field in fields(self) if field.name != "teacher_name"]
        values = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {mine} against {theirs}" for name, mine, theirs in values if mine != theirs]


def read_plan(path: Path) -> CachePlan:
    """The plan in a plan or manifest file.

    Raises:
        ValueError: it is none, or of another version of the format.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"it has format version {found['version']}; this ptl reads {VERSION}")
        return CachePlan(**{field.name: found[field.name] for field in fields(CachePlan)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no plan of a teacher cache ({error}): delete its folder and make it again"
        ) from error


def shard_bounds(offsets: np.ndarray, shard_tokens: int) -> np.ndarray:
    """First row of each shard, and after the last the number of rows; int64 [S + 1]. No row is cut."""
    starts = np.flatnonzero(np.diff(offsets[:-1] // shard_tokens, prepend=-1))
    return np.append(starts, len(offsets) - 1)


def shard_name(index: int) -> str:
    """The file of a shard."""
    return f"shard-{index:05d}.safetensors"


def part_name(plan: CachePlan) -> str:
    """The folder of a part, named by its data."""
    return f"data-{plan.data[:16]}"


def plan_text(plan: CachePlan, **more: Any) -> str:
    """A plan, and what a manifest adds to it, as JSON."""
    return json.dumps({**asdict(plan), **more}, indent=1) + "\n"
