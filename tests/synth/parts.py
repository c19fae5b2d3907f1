"""A tiny teacher, its data, and caches of them, for tests and for the processes that they start."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests import tiny
from tests.objectives import law

TEMPERATURE = 2.0
SHARD_TOKENS = 64


def make_folder(folder: Path, *, rows: int = 24) -> Path:
    """A folder with a teacher whose table has more rows than the tokenizer has ids, and conversations."""
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(410, tie=False, seed=3, initializer_range=0.5).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    law.write_rows(folder / "rows.jsonl", count=rows)
    return folder


def data_of(folder: Path, **options: Any):
    """The data module on those rows."""
    from ptl.data.module import ChatDataModule, Preparation
    from ptl.data.sources import Source

    defaults: dict[str, Any] = {"max_length": 256, "tokenizer": f"{folder}/teacher"}
    return ChatDataModule(
        [Source(path=f"{folder}/rows.jsonl")],
        preparation=Preparation(cache_dir=f"{folder}/cache", num_proc=1),
        **{**defaults, **options},
    )


def plan_of(folder: Path, data: Any, **changes: Any):
    """What is kept: the top 8 at ``TEMPERATURE``."""
    from ptl.data.contents import contents
    from ptl.data.fingerprints import teacher_digest, template_digest
    from ptl.data.teacher_plan import CachePlan
    from ptl.models.spec import ModelSpec
    from ptl.models.vocabulary import vocabulary_fingerprint

    values: dict[str, Any] = {
        "mode": "topk",
        "k": 8,
        "temperature": TEMPERATURE,
        "teacher": teacher_digest(ModelSpec(name=f"{folder}/teacher"))[0],
        "teacher_name": "teacher",
        "tokenizer": vocabulary_fingerprint(data.renderer.tokenizer),
        "template": template_digest(data.renderer),
        "vocab": len(data.renderer.tokenizer),
        "data": contents(data.prepared_rows("train")).hash,
        "shard_tokens": SHARD_TOKENS,
    }
    return CachePlan(**{**values, **changes})


def teacher_of(folder: Path):
    """The teacher, frozen."""
    from ptl.models.spec import ModelSpec
    from ptl.models.teachers import build_teacher

    return build_teacher(ModelSpec(name=f"{folder}/teacher"))


def write(
    folder: Path, out: Path, *, rank: int = 0, world_size: int = 1, model: Any = None, data: Any = None, **options: Any
):
    """Writes the missing shards of a rank and seals; returns the writer and its manifest."""
    from ptl.data.contents import contents
    from ptl.data.teacher_writer import CacheWriter
    from ptl.synth.teacher import Reading, write_shard

    data = data or data_of(folder)
    prepared = data.prepared_rows("train")
    writer = CacheWriter(out, plan_of(folder, data, **options), contents(prepared))
    reading = Reading(model=model or teacher_of(folder), prepared=prepared, batch_tokens=200)
    for index in writer.missing(rank, world_size):
        write_shard(reading, writer, index)
    return writer, writer.seal()


def in_process(folder: str, out: str) -> dict[str, Any]:
    """A rank's share of a cache, by the variables that a launcher sets."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    writer, manifest = write(Path(folder), Path(out), rank=rank, world_size=world_size)
    return {"own": len(range(rank, len(writer), world_size)), "sealed": manifest is not None}


def killed(folder: str, out: str, shards: int) -> None:
    """Writes a cache and is killed in the middle of shard number ``shards``: its file is half there."""
    from ptl.data import teacher_writer

    save = teacher_writer.save_file

    def torn(tensors: Any, path: Path, **options: Any) -> None:
        save(tensors, path, **options)
        if len(list(Path(path).parent.glob("shard-*"))) == shards:
            with open(path, "rb+") as file:
                file.truncate(Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    teacher_writer.save_file = torn
    write(Path(folder), Path(out))
