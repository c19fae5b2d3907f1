"""A teacher's distributions on disk: what is kept of them, for which teacher and data, and how a batch finds its own.

A cache is a folder with a part for each prepared data set that the teacher has read::

    CACHE/PART/plan.json                what is kept, of which teacher and data; written first
    CACHE/PART/rows.safetensors         offsets int64 [N + 1], digests uint64 [N]; see ``ptl.data.contents``
    CACHE/PART/shard-00000.safetensors  entries of the trained tokens of consecutive rows
    CACHE/PART/manifest.json            the plan, and each shard's size and counts; written last

The entry of trained token i of row r is number ``offsets[r] + i``, so neither order, packs nor micro-batches matter.
Of a token, ``topk`` keeps its k likeliest ids (uint16 up to 65,536 ids, else int32) with float16 log-probabilities, the
float32 log of the mass of all others, and the float32 entropy. ``sample`` keeps the distinct ids of n draws with
replacement and how often each was drawn (uint16): shares of draws are an unbiased estimate of the distribution, while
a top-k alone is biased (arXiv:2503.16870). A token for which the teacher gave no numbers (NaN) has an entry without
mass: no ids, log-probabilities and tail -inf, entropy 0; nothing is learnt from it.
"""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptl.data.batches import documents_of, sent
from ptl.data.contents import row_digest
from ptl.data.mapped import mapped
from ptl.data.teacher_plan import MANIFEST, PLAN, ROWS, read_plan, shard_bounds, shard_name
from ptl.types import SparseTargets, TokenBatch

_OPEN_SHARDS = 256


class TeacherCache:
    """Reads one part of a cache. Nothing but a few numbers a row is mapped before it is asked for; picklable.

    Make it with ``TeacherCache.open``.

    Attributes:
        folder: of the part.
        plan: what it holds.
        manifest: counts: ``rows``, ``tokens``, ``skipped`` (tokens without numbers), ``shards``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = read_plan(folder / MANIFEST)
        self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in self.manifest["shards"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"the teacher cache {folder} is damaged: {name} is not {entry['bytes']} bytes; delete {name} and "
                    f"{MANIFEST}, and run the `ptl synth teacher` that made it again"
                )
        self._load()

    def _load(self) -> None:
        rows, _ = mapped(self.folder / ROWS)
        self._offsets, self._digests = rows["offsets"], rows["digests"]
        self._bounds = shard_bounds(self._offsets, self.plan.shard_tokens)
        self._shards: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "plan": self.plan, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        data_hash: str,
        tokenizer: str,
        temperature: float,
        template: str | None = None,
        teacher: str | None = None,
    ) -> TeacherCache:
        """The part of a cache that was made for this data; what it was made with must be what is wanted.

        Args:
            folder: the cache.
            data_hash: ``Contents.hash`` of the prepared rows.
            tokenizer: ``vocabulary_fingerprint`` of the run's tokenizer.
            temperature: of the divergence. Log-probabilities at one cannot be brought to another from a part of them.
            template: ``template_digest`` of the run's chat template; None does not ask.
            teacher: ``teacher_digest`` of the teacher that the run names; None does not ask.

        Raises:
            ValueError: there is no such cache, it is not finished, or something differs, with both values and what to
                run.
        """
        folder = Path(folder).expanduser()
        part = _part_of(folder, data_hash)
        if not (part / MANIFEST).is_file():
            done = len(list(part.glob("shard-*.safetensors")))
            raise ValueError(
                f"the teacher cache {part} is not finished ({done} shards so far): run the `ptl synth teacher` that "
                "began it again; it goes on where it stopped"
            )
        cache = cls(part)
        cache.require(tokenizer=tokenizer, template=template, teacher=teacher, temperature=temperature)
        return cache

    def require(self, **wanted: Any) -> None:
        """Refuses a cache whose plan has other values than those wanted; None asks nothing.

        Raises:
            ValueError: with both values of each, and what to run.
        """
        wrong = [
            f"{name} {getattr(self.plan, name)}, and the run has {value}"
            for name, value in wanted.items()
            if value is not None and getattr(self.plan, name) != value
        ]
        if wrong:
            cache = self.folder.parent
            raise ValueError(f"the teacher cache {cache} was made with {'; '.join(wrong)}: {_remake(cache)}")

    def __len__(self) -> int:
        """Trained tokens it has entries of."""
        return int(self._offsets[-1])

    def lookup(self, batch: TokenBatch) -> SparseTargets:
        """What the teacher said before each of the batch's N trained tokens, in the order of ``shifted_targets``.

        The head of a ``topk`` is scaled to the mass that the exact tail leaves it, which takes back the rounding of its
        float16 numbers. The result lies on the batch's device.

        Raises:
            ValueError: a document of the batch is not the row that it says it is, or was not read from prepared rows.
        """
        documents = documents_of(batch)
        if documents.rows is None:
            raise ValueError(
                "the batch does not say which prepared rows it holds, so a cached teacher knows nothing of it: texts "
                "sampled by the student need a live teacher, without teacher.cache"
            )
        pieces = []
        for row, (begin, end) in zip(documents.rows.tolist(), itertools.pairwise(documents.bounds.tolist())):
            asked = np.flatnonzero(documents.weights[begin:end])
            if len(asked):
                pieces.append(self._entries(row, documents.ids[begin:end], asked))
        read = self._topk if self.plan.mode == "topk" else self._sample
        return SparseTargets(*sent(read(pieces), batch.input_ids.device))

    def _entries(self, row: int, ids: np.ndarray, positions: np.ndarray) -> tuple[dict[str, np.ndarray], slice]:
        """The shard that holds a row, and where in it."""
        if not 0 <= row < len(self._digests) or int(self._digests[row]) != row_digest(ids, positions):
            raise ValueError(
                f"row {row} of the batch is not row {row} of the teacher cache {self.folder} (its ids or its trained "
                "tokens differ), so its targets would be another document's: train on the rows whose hash is "
                f"{self.plan.data}, or write the cache again"
            )
        index = int(np.searchsorted(self._bounds, row, side="right")) - 1
        base = int(self._offsets[self._bounds[index]])
        return self._shard(index), slice(int(self._offsets[row]) - base, int(self._offsets[row + 1]) - base)

    def _shard(self, index: int) -> dict[str, np.ndarray]:
        if index not in self._shards:
            self._shards[index], _ = mapped(self.folder / shard_name(index))
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        self._shards.move_to_end(index)
        return self._shards[index]

    def _topk(self, pieces: list[tuple[dict[str, np.ndarray], slice]]) -> Iterator[Tensor | bool]:
        k = self.plan.k
        ids = _joined(pieces, "ids", np.int64, (k,))
        logprobs = _joined(pieces, "logprobs", np.float32, (k,))
        tail, entropy = _joined(pieces, "tail", np.float32), _joined(pieces, "entropy", np.float32)
        ids[np.isneginf(logprobs)] = -1
        yield torch.from_numpy(ids)
        yield rescaled(torch.from_numpy(logprobs), torch.from_numpy(tail))
        yield from (torch.from_numpy(tail), torch.from_numpy(entropy))
        yield bool(np.isneginf(tail).all())

    def _sample(self, pieces: list[tuple[dict[str, np.ndarray], slice]]) -> Iterator[Tensor | bool]:
        n = sum(where.stop - where.start for _, where in pieces)
        distinct = [np.diff(shard["starts"][where.start : where.stop + 1]) for shard, where in pieces]
        width = max((int(each.max()) for each in distinct), default=1) or 1
        ids, counts = np.full((n, width), -1, np.int64), np.zeros((n, width), np.float32)
        row = 0
        for (shard, where), numbers in zip(pieces, distinct):
            used = np.arange(width) < numbers[:, None]
            flat = slice(int(shard["starts"][where.start]), int(shard["starts"][where.stop]))
            ids[row : row + len(numbers)][used] = shard["ids"][flat]
            counts[row : row + len(numbers)][used] = shard["counts"][flat]
            row += len(numbers)
        yield torch.from_numpy(ids)
        yield torch.log(torch.from_numpy(counts) / self.plan.k)
        yield torch.full((n,), float("-inf"))
        yield torch.from_numpy(_joined(pieces, "entropy", np.float32))
        yield True


def _joined(pieces: list[Any], name: str, dtype: type, shape: tuple[int, ...] = ()) -> np.ndarray:
    parts = [shard[name][where] for shard, where in pieces] or [np.zeros((0, *shape))]
    return np.concatenate(parts).astype(dtype)


def rescaled(logprobs: Tensor, tail: Tensor) -> Tensor:
    """[N, K] log-probabilities with the same ratios, whose mass and that of ``tail`` [N] make 1; rows of -inf stay."""
    mass = torch.logsumexp(logprobs, -1)
    left = torch.where(mass > float("-inf"), torch.log(-torch.expm1(tail)) - mass, 0.0)
    return logprobs + left[:, None]


def _part_of(folder: Path, data_hash: str) -> Path:
    """The part that was made for the data, whole or begun."""
    found = {read_plan(path).data: path.parent for path in sorted(folder.glob(f"*/{PLAN}"))}
    if not found:
        raise ValueError(f"{folder} holds no teacher cache: make it with `ptl synth teacher -c RECIPE --out {folder}`")
    if data_hash not in found:
        raise ValueError(
            f"the teacher cache {folder} was made for the data {' and '.join(found)}, and the run's rows have the hash "
            f"{data_hash} (other rows, tokens, trained turns, or order): {_remake(folder)}"
        )
    return found[data_hash]


def _remake(folder: Path) -> str:
    return f"use what it was made with, or make another with `ptl synth teacher -c RECIPE --out {folder}-2`"
