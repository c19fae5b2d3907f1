"""Writes a teacher's cache shard by shard: each whole or absent, by any number of processes, again and again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ptl.data.contents import Contents
from ptl.data.durable import TEMPORARY
from ptl.data.fingerprints import Stamps
from ptl.data.mapped import mapped, published
from ptl.data.teacher_plan import (
    MANIFEST,
    PLAN,
    ROWS,
    CachePlan,
    part_name,
    plan_text,
    read_plan,
    shard_bounds,
    shard_name,
)


class CacheWriter:
    """One part of a cache in the making. Processes need not know of each other: all that they agree on is on disk.

    What a shard holds depends on the plan and the rows alone, so that a writer that was killed and began again ends
    with the same bytes.

    Args:
        cache: the folder of the cache.
        plan: what is kept, and of what.
        rows: the index of the data.

    Attributes:
        folder: of the part.
        bounds: int64 [S + 1], the first row of each shard.

    Raises:
        ValueError: the folder holds a part of the same data that was made by another plan.
    """

    def __init__(self, cache: str | Path, plan: CachePlan, rows: Contents) -> None:
        self.folder, self.rows = Path(cache).expanduser() / part_name(plan), rows
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / PLAN
        if not path.exists():
            with published(path) as partial:
                partial.write_text(plan_text(plan), encoding="utf-8")
        self.plan = read_plan(path)
        if different := self.plan.differences(plan):
            raise ValueError(
                f"{self.folder} holds what another teacher or other options made ({'; '.join(different)}): give "
                "another --out, or delete the folder"
            )
        self.bounds = shard_bounds(rows.offsets, plan.shard_tokens)
        if not (self.folder / ROWS).exists():
            with published(self.folder / ROWS) as partial:
                save_file({"offsets": np.array(rows.offsets), "digests": np.array(rows.digests)}, partial)

    def __len__(self) -> int:
        """Shards of the part."""
        return len(self.bounds) - 1

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Shards that are not there yet, of those dealt to a rank."""
        own = range(rank, len(self), world_size)
        return [index for index in own if not (self.folder / shard_name(index)).exists()]

    def span(self, index: int) -> tuple[int, int]:
        """First row of a shard, and the one after its last."""
        return int(self.bounds[index]), int(self.bounds[index + 1])

    def write(self, index: int, tensors: Mapping[str, np.ndarray], skipped: int) -> None:
        """Puts a shard on disk.

        Args:
            index: its number.
            tensors: ``ids``, ``logprobs``, ``tail``, ``entropy`` of ``topk``; ``starts``, ``ids``, ``counts``,
                ``entropy`` of ``sample``.
            skipped: tokens of it without numbers.
        """
        # One key: the library writes several in no fixed order.
        facts = json.dumps({"plan": plan_text(self.plan), "shard": index, "skipped": skipped})
        with published(self.folder / shard_name(index)) as partial:
            save_file(dict(tensors), partial, metadata={"ptl": facts})

    def seal(self, stamps: Stamps | None = None) -> dict[str, Any] | None:
        """The manifest, written now if all shards are there; None while some are missing.

        Args:
            stamps: of the teacher's files, by which a reader need not hash them again.

        Raises:
            ValueError: a shard is not of this plan.
        """
        if self.missing():
            return None
        shards = {}
        for index in range(len(self)):
            path, (begin, end) = self.folder / shard_name(index), self.span(index)
            facts = json.loads(mapped(path)[1]["ptl"])
            if facts["plan"] != plan_text(self.plan):
                raise ValueError(f"{path} is of another cache: delete it and run the command again")
            tokens = int(self.rows.offsets[end] - self.rows.offsets[begin])
            shards[path.name] = {"bytes": path.stat().st_size, "tokens": tokens, "skipped": facts["skipped"]}
        counts = {
            "rows": len(self.rows.digests),
            "tokens": int(self.rows.offsets[-1]),
            "skipped": sum(shard["skipped"] for shard in shards.values()),
            "bytes": sum(shard["bytes"] for shard in shards.values()),
        }
        more = {**counts, "ptl": metadata.version("ptl"), "teacher_files": stamps or {}, "shards": shards}
        with published(self.folder / MANIFEST) as partial:
            partial.write_text(plan_text(self.plan, **more), encoding="utf-8")
        for left in self.folder.glob(f".*{TEMPORARY}-*"):
            left.unlink(missing_ok=True)  # of writers that were killed
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
