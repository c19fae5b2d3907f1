"""A model from scratch: a tokenizer, and the sizes of the model as keys of its configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ptl.models.vocabulary import vocabulary_size

MULTIPLE = 64
"""Rows of the embedding are rounded up to one, as matrix units like it."""


def tokenizer_alone(name: str) -> Path | None:
    """The absolute folder where ``name`` is one that holds a tokenizer and no model, else None."""
    folder = Path(name).expanduser()
    alone = (folder / "tokenizer.json").is_file() and not (folder / "config.json").exists()
    return folder.resolve() if alone else None


def scratch_config(folder: Path, keys: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model for a tokenizer.

    Arguments:
        folder: the tokenizer's.
        keys: ``model_type`` (``llama``, ``qwen3``, ...) and keys of that type's ``config.json``. ``vocab_size`` and
            the ids of special tokens come from the tokenizer where they are not given.

    Raises:
        ValueError: no such type or key, sizes that contradict each other, or fewer rows than tokens.
    """
    values = dict(keys)
    kind = values.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{folder} is a tokenizer alone: config_overrides.model_type must say what model to begin, such as llama, "
            f"got {kind!r}{hint}"
        )
    known = AutoConfig.for_model(kind).to_dict()
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config_overrides: the configuration of {kind} has no key {key!r}{hint}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = vocabulary_size(tokenizer)
    values.setdefault("vocab_size", -(-size // MULTIPLE) * MULTIPLE)
    if values["vocab_size"] < size:
        raise ValueError(
            f"config_overrides.vocab_size is {values['vocab_size']}, but the tokenizer has {size} tokens: leave it out"
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values.setdefault(key, getattr(tokenizer, key))
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # the library's checks raise errors of several kinds
        raise ValueError(f"config_overrides: {' '.join(str(error).split())[:300]}") from error
