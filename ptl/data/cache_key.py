"""The key of prepared data: everything the tokens depend on, and nothing that would miss a reuse.

Data by content (size and digests, ``files.file_identity``), the source's options, tokenizer, template and policy
(``Renderer.fingerprint``), the view, the length limit, and the code: the source text of every module of ``ptl.data``
but those listed in ``AFTER``, and of those in ``BESIDE``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ptl.data.files import Files
from ptl.data.render import Renderer, Truncation
from ptl.data.sources import Source
from ptl.data.views import View

AFTER = (
    *("claim.py", "contents.py", "cross_teacher.py", "durable.py", "easy_first.py", "fingerprints.py", "held_out.py"),
    *("loader.py", "mapped.py", "module.py", "on_policy.py", "order.py", "packing.py", "parts.py", "pieces.py"),
    *("preview.py", "progress.py", "realign.py", "report.py", "teacher_cache.py", "teacher_plan.py"),
    *("teacher_writer.py", "token_sets.py", "tokenizer_training.py", "turns.py", "units.py", "workers.py"),
)
"""Modules that show, order or wait for what is prepared, and do not change it."""
BESIDE = ("rewards/code.py", "rewards/sandbox/asserts.py", "rewards/sandbox/names.py")
"""Modules outside of this folder that change what a prompt says (``records._naming_the_function``)."""
LIBRARIES = ("tokenizers", "transformers")


def cache_inputs(
    sources: Sequence[Source],
    files: Sequence[Files],
    *,
    view: View,
    renderer: Renderer,
    max_length: int,
    truncation: Truncation,
    deduplicate: bool,
) -> dict[str, Any]:
    """What prepared data is made from, as JSON; equal inputs give equal tokens.

    Arguments as for ``prepare``, and the files of each source.
    """
    return {
        "sources": [_source(source, own) for source, own in zip(sources, files)],
        "renderer": renderer.fingerprint(),
        "view": [f"{type(view).__module__}.{type(view).__qualname__}", view.settings],
        "max_length": max_length,
        "truncation": truncation,
        "deduplicate": deduplicate,
        "code": code_version(view),
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
    }


def cache_key(inputs: Mapping[str, Any]) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def _source(source: Source, files: Files) -> dict[str, Any]:
    """A source without its name and weight, which change no token."""
    return {
        "format": source.format,
        "split": source.split,
        "columns": source.columns,
        "roles": source.roles,
        "limit": source.limit,
        "pass_rate": source.pass_rate,
        "files": [file.identity() for file in files],
    }


def code_version(view: View, folder: Path = Path(__file__).parent) -> str:
    """Hash of the modules that make tokens, and of the view's own where it lies elsewhere."""
    modules = {path for path in folder.glob("*.py") if path.name not in AFTER}
    modules |= {Path(__file__).parent.parent / name for name in BESIDE}
    modules |= {
        Path(inspect.getfile(kind)) for kind in type(view).__mro__ if kind.__module__ not in ("abc", "builtins")
    }
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(modules):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
