"""Models that a report loads by itself: baselines beside the student, and a teacher that is only cached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptl.callbacks.export import FOLDER
from ptl.data.tokenizer import load_tokenizer
from ptl.models.spec import ModelSpec
from ptl.models.teachers import build_teacher
from ptl.models.vocabulary import token_table
from ptl.models.zero3 import zero3_hidden

RESERVED = ("teacher", "before", "after")
"""Names of the report's own models."""


def loaded(spec: ModelSpec, device: torch.device, beside: nn.Module) -> nn.Module:
    """A frozen model in eval mode, whole on the device; a quantised one is where its library puts it.

    Args:
        spec: of the model.
        device: of this rank.
        beside: the model in training, which may be sharded.
    """
    with zero3_hidden(beside):
        model = build_teacher(spec)
    return model if spec.quantize else model.to(device)


def model_folder(name: str, folder: str) -> str:
    """What to load a baseline from: a folder of its own, or the export of a run folder.

    Raises:
        ValueError: there is no model, or the name is one of the report's own.
    """
    if name in RESERVED or not name.strip():
        raise ValueError(
            f"DistillReport.baselines: the report itself has {', '.join(RESERVED)}; choose a name, got {name!r}"
        )
    path = Path(folder).expanduser()
    for candidate in (path / FOLDER, path):
        if (candidate / "config.json").is_file():
            return str(candidate)
    raise ValueError(
        f"DistillReport.baselines {name}: no model in {folder}; give a Hugging Face folder, or a run folder whose "
        "callback Export has written its export"
    )


def check_tokenizer(name: str, folder: str, tokenizer: Any) -> None:
    """Refuses a baseline whose ids mean other strings than the run's.

    Raises:
        ValueError: with the first id that differs.
    """
    ours, theirs = token_table(tokenizer), token_table(load_tokenizer(folder))
    if ours == theirs:
        return
    shared = zip(ours, theirs)
    at = next((i for i, (one, other) in enumerate(shared) if one != other), min(len(ours), len(theirs)))
    raise ValueError(
        f"DistillReport.baselines {name}: the tokenizer in {folder} differs from data.tokenizer from id {at} on "
        f"({len(theirs)} and {len(ours)} ids), so their models cannot be compared token by token: remove it"
    )
