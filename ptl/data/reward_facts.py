"""``ptl_reward.json``: what must be known beside a reward model's weights to use its scores rightly.

The scores of a reward model mean something only on text that is printed as in training, and their size only beside
their mean and deviation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptl.data.fingerprints import template_digest
from ptl.data.render import Renderer, RenderPolicy
from ptl.models.vocabulary import vocabulary_fingerprint

FILE = "ptl_reward.json"
VERSION = 1
_RENDER = ("template_kwargs", "date", "history")
"""What of a ``RenderPolicy`` changes the text: the same template prints another date, or no place for a thought."""


def reward_facts(renderer: Renderer, measured: Mapping[str, Any] | None, stage: str | None) -> dict[str, Any]:
    """The file's contents.

    Args:
        renderer: prints the conversations of training.
        measured: ``ptl.functional.ranking_measures.measures_of`` of the final scores; None where none were made.
        stage: ``val`` or ``train``, the rows it was measured on.
    """
    known = measured or {}
    return {
        "version": VERSION,
        "mean": known.get("reward_mean"),
        "std": known.get("reward_std"),
        "answers": known.get("answers", 0),
        "measured_on": stage,
        "accuracy": known.get("accuracy"),
        "template": template_digest(renderer),
        "tokenizer": vocabulary_fingerprint(renderer.tokenizer),
        "render": {key: getattr(renderer.policy, key) for key in _RENDER},
    }


def render_policy(facts: Mapping[str, Any] | None) -> RenderPolicy:
    """The policy that prints conversations as in training; the default where the facts say nothing.

    Which turns were trained is no part of it: a score is read at the end, whatever was trained.
    """
    told = (facts or {}).get("render") or {}
    return RenderPolicy(**{key: told[key] for key in _RENDER if key in told})


def read_reward_facts(folder: str | Path, renderer: Renderer | None = None) -> dict[str, Any] | None:
    """The facts beside a reward model, or None where it has none: it was not made here.

    Args:
        folder: of the model.
        renderer: what will print its conversations; None does not compare.

    Raises:
        ValueError: the file cannot be read, or the renderer prints other tokens than the model was trained on.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): export the reward model again") from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}; this version reads {VERSION}")
    if renderer is None:
        return facts
    for what, own in (
        ("template", template_digest(renderer)),
        ("tokenizer", vocabulary_fingerprint(renderer.tokenizer)),
    ):
        if facts.get(what) != own:
            raise ValueError(
                f"{folder}: the reward model was trained with the {what} {str(facts.get(what))[:12]}, and this one is "
                f"{own[:12]}: its scores would mean nothing; use the tokenizer and template of its folder"
            )
    return facts
