"""Digests of what a teacher's cache depends on besides its data, and how a run opens the one that fits it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ptl.data.contents import contents
from ptl.data.prepare import Prepared
from ptl.data.render import Renderer
from ptl.data.teacher_cache import TeacherCache
from ptl.models.build import find_source
from ptl.models.spec import ModelSpec
from ptl.models.vocabulary import vocabulary_fingerprint

Stamps = dict[str, list[Any]]
"""Of each weight or configuration file: size, time of its last change in ns, sha256."""


def open_cache(
    folder: str | Path, prepared: Prepared, renderer: Renderer, *, temperature: float, teacher: ModelSpec | None = None
) -> TeacherCache:
    """The part of a cache that belongs to prepared rows, after a check of all that it depends on.

    Args:
        folder: the cache.
        prepared: ``ChatDataModule.prepared_rows``.
        renderer: of the run.
        temperature: of the divergence.
        teacher: the model that the run names; None where it names none. Its files are hashed only if they changed since
            the cache was made.

    Raises:
        ValueError: as ``TeacherCache.open``.
    """
    cache = TeacherCache.open(
        folder,
        data_hash=contents(prepared).hash,
        tokenizer=vocabulary_fingerprint(renderer.tokenizer),
        template=template_digest(renderer),
        temperature=temperature,
    )
    if teacher is not None:
        cache.require(teacher=teacher_digest(teacher, cache.manifest["teacher_files"])[0])
    return cache


def template_digest(renderer: Renderer) -> str:
    """sha256 of the chat template's text."""
    return hashlib.sha256(renderer.template.encode()).hexdigest()


def teacher_digest(spec: ModelSpec, known: Mapping[str, list[Any]] | None = None) -> tuple[str, Stamps]:
    """Digest of a model's content and of the options that change what it computes.

    Of a folder, sha256 over its configuration and weights; of a hub name, its commit.

    Args:
        spec: the model.
        known: stamps of an earlier call: a file whose size and time are the same is not read again.

    Returns:
        The digest, and the stamps of a folder's files.

    Raises:
        ValueError: no such model, or a hub name of which no commit is on this machine.
    """
    source = find_source(spec.name)
    shrink = None if spec.shrink is None else asdict(spec.shrink)
    options = [spec.dtype, spec.quantize, spec.random_init, spec.config_overrides, shrink]
    stamps: Stamps = {}
    content: Any = None
    if Path(source).is_dir():
        for path in sorted(Path(source).iterdir()):
            if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
                stamps[path.name] = _stamp(path, (known or {}).get(path.name))
        content = {name: stamp[2] for name, stamp in stamps.items()}
    else:
        content = [source, _commit(source, spec.revision)]
    text = json.dumps([content, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), stamps


def _stamp(path: Path, known: list[Any] | None) -> list[Any]:
    now = path.stat()
    if known is not None and known[:2] == [now.st_size, now.st_mtime_ns]:
        return list(known)
    with path.open("rb") as file:
        return [now.st_size, now.st_mtime_ns, hashlib.file_digest(file, "sha256").hexdigest()]


def _commit(name: str, revision: str | None) -> str:
    """The commit of a hub name, from the folder that its files are kept in."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        found = cached_file(name, "config.json", revision=revision)
    except OSError as error:
        raise ValueError(f"cannot read the model {name!r}: {' '.join(str(error).split())[:300]}") from error
    commit = extract_commit_hash(found, None)
    if commit is None:
        raise ValueError(f"the hub gave no commit of the model {name!r}: give a folder")
    return commit
