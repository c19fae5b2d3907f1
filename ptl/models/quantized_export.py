"""Saving a model in 4 or 8 bits as a folder that plain transformers loads with its codes.

The weights are merged and written in fp32 first, and the codes are made of those: an adapter that is merged into codes
would be rounded with them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from ptl.models.export import DTYPES, SHARD, export, float_dtype, has_scalar_head, whole_folder
from ptl.models.quantize import is_quantized, quantization_config
from ptl.models.scoring import saved_head


def export_quantized(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    kind: Literal["nf4", "int8"],
    *,
    dtype: str | None = None,
    generation_eos: Sequence[int] = (),
    files: Mapping[str, str] | None = None,
) -> Path:
    """Writes ``model``, its adapter merged, with its linear layers as bitsandbytes codes.

    Heads (``score``, ``lm_head``) and embeddings stay floats; a scalar head is fp32 in the file whatever ``dtype``.

    Arguments:
        model: plain, adapted or quantised; not changed.
        tokenizer: as in ``export``, as are ``folder``, ``generation_eos`` and ``files``.
        folder: where to; whole or absent.
        kind: ``nf4`` or ``int8``.
        dtype: of what stays floats, and of computation; None keeps the model's own. transformers reads a file into one
            dtype: of a reward model in bf16 it rounds the score, too.

    Raises:
        ValueError: as ``export``; bitsandbytes is not installed; nothing became a code, or a scalar head did.
    """
    target = Path(folder)
    floats = DTYPES[dtype] if dtype is not None else float_dtype(model)
    config = quantization_config(kind, floats)
    with whole_folder(target) as temporary, TemporaryDirectory(prefix=".plain-", dir=target.parent) as scratch:
        plain = export(
            model, tokenizer, Path(scratch) / "model", dtype="fp32", generation_eos=generation_eos, files=files
        )
        auto: Any = AutoModelForSequenceClassification if has_scalar_head(model) else AutoModelForCausalLM
        coded = auto.from_pretrained(plain, dtype=floats, quantization_config=config)
        if not is_quantized(coded):
            raise ValueError(f"quantize {kind}: {type(coded).__name__} has no linear layer to quantise")
        if has_scalar_head(model):
            coded.score.weight = nn.Parameter(_head(plain).to(coded.score.weight.device), requires_grad=False)
        coded.save_pretrained(temporary, max_shard_size=SHARD)
        if has_scalar_head(model):
            _head(temporary)
        for path in plain.iterdir():
            if not path.name.startswith("model") and not (temporary / path.name).exists():
                shutil.copy(path, temporary)
    return target


def _head(folder: Path) -> Tensor:
    """The scalar head of a folder, which must be in fp32 and no codes."""
    head = saved_head(folder)
    if head is None or head.dtype != torch.float32:
        raise ValueError(f"the score of {folder} is {head.dtype if head is not None else 'absent'}; expected float32")
    return head
