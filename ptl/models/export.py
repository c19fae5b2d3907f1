"""Saving a model as a plain Hugging Face folder that loads elsewhere to the same logits (law 9)."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptl.models.adapters import base_model, is_adapted, merged_state, save_adapter
from ptl.models.padding import safe_pad_id, with_pad
from ptl.models.quantize import dequantize_state
from ptl.models.zero3 import zero3_hidden

if TYPE_CHECKING:
    from ptl.models.spec import ModelSpec

BASE_FILE = "ptl_base.json"
"""Beside an adapter: how its base was loaded, which ``ptl export`` needs to merge onto the base it was trained on."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
SHARD = "5GB"
_MARKS = ("config.json", "adapter_config.json")


def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    dtype: str | None = None,
    merged: bool = True,
    generation_eos: Sequence[int] = (),
    state_dict: Mapping[str, Tensor] | None = None,
    base_state: Mapping[str, Tensor] | None = None,
    spec: ModelSpec | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Writes weights, configuration, tokenizer, chat template and, of a language model, generation configuration.

    The folder is whole or absent: it is written beside its place, made durable, and renamed. An earlier export there
    is replaced. ``model`` and ``tokenizer`` are not changed, so a run may export while it trains. In a job of several
    ranks one rank calls this.

    A model with a scalar head becomes a plain ``AutoModelForSequenceClassification``. Its configuration and its
    tokenizer name a padding token that no conversation ends with (``ptl.models.padding``).

    Arguments:
        model: plain, adapted or quantised.
        tokenizer: with the chat template that the model was trained on.
        folder: where to.
        dtype: ``bf16``, ``fp32`` or ``fp16``; None keeps the model's own. A scalar head stays fp32.
        merged: write a plain model, LoRA merged into its base and codes dequantised; else the adapter alone.
        generation_eos: ids that end an answer, beside those that the model already stops at.
        state_dict: ``model``'s state dict gathered from all ranks, where ZeRO-3 has sharded it; trainable entries are
            enough for an adapter alone. ``model.state_dict()`` by default.
        base_state: base weights to merge onto in place of those trained on.
        spec: what the model was built from; needed for an adapter alone.
        files: further texts of the folder, by file name.

    Returns:
        ``folder``.

    Raises:
        ValueError: something else lies at ``folder``, weights are missing, or the adapter cannot stand alone.
    """
    target = Path(folder)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    scalar = has_scalar_head(model)
    if scalar:
        tokenizer = with_pad(tokenizer, safe_pad_id(tokenizer, generation_eos))  # pyright: ignore[reportArgumentType]
    with whole_folder(target) as temporary:
        if merged:
            state = dequantize_state(state)
            if is_adapted(model):
                state = merged_state(model, state, base_state)
            _write_model(base_model(model), state, temporary, dtype, tokenizer)
        else:
            _write_adapter(model, state, temporary, spec)
        if not scalar:
            _generation_config(base_model(model), tokenizer, generation_eos).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
    return target


def has_scalar_head(model: nn.Module) -> bool:
    """Whether the model gives a number a sequence instead of the next token."""
    return hasattr(base_model(model), "score")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``target`` when the block ends well, and vanishes when it does not.

    Raises:
        ValueError: ``target`` is a file, or a folder that is not empty and holds no model.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: give the folder to write the model to")
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).is_file() for mark in _MARKS):
        raise ValueError(f"{target} is not empty and holds no model: give another folder, or empty it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():
                path.chmod(mode)  # safetensors writes files that only their owner may read
            _sync(path)
        if target.is_dir():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the rename stays atomic
    finally:
        os.close(handle)


def _write_model(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    folder: Path,
    dtype: str | None,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Weights and ``config.json`` through a weightless twin of the model, which carries no quantiser and no shards."""
    kind = DTYPES[dtype] if dtype is not None else float_dtype(model)
    twin = _twin(model, kind, tokenizer)
    rows = twin.config.get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but the embedding {rows} rows: not its tokenizer")
    first: dict[int, str] = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        # A tied matrix is written once, under its first name; loading ties it again.
        if first.setdefault(id(parameter), name) != name:
            state.pop(name, None)
    missing = [name for name in first.values() if name not in state]
    if missing:
        raise ValueError(f"the state dict lacks {len(missing)} weights, first {missing[0]}: gather every parameter")
    wrong = [name for name, p in twin.named_parameters() if state[name].shape != p.shape]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is of shape {tuple(state[wrong[0]].shape)}: gather every parameter before exporting"
        )
    known = set(first.values()) | {name for name, _ in twin.named_buffers()}
    kept = {name: _cast(name, tensor, kind) for name, tensor in state.items() if name in known}
    twin.save_pretrained(folder, state_dict=kept, max_shard_size=SHARD)


def _twin(model: PreTrainedModel, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    values = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    config = type(model.config).from_dict(values)
    config.use_cache = True  # switched off for training alone
    if has_scalar_head(model):
        config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    elif config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    with zero3_hidden(model), torch.device("meta"):
        twin: Any = type(model)(config)
    return twin.to(dtype)


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most weights that are floats."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            numel = getattr(parameter, "ds_numel", parameter.numel())
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + numel
    return max(sizes, key=lambda kind: sizes[kind])


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    if not tensor.dtype.is_floating_point:
        return tensor
    return tensor.to(torch.float32 if name.startswith("score.") else dtype).contiguous()


def _write_adapter(model: nn.Module, state: dict[str, Tensor], folder: Path, spec: ModelSpec | None) -> None:
    if not is_adapted(model):
        raise ValueError("the model has no adapter to save alone: export it merged")
    if spec is None:
        raise ValueError("an adapter alone needs the spec of its base model")
    if spec.random_init or spec.config_overrides or spec.shrink is not None:
        raise ValueError(
            "an adapter alone would not load elsewhere: its base has random_init, config_overrides or shrink; export "
            "it merged"
        )
    base = str(base_model(model).name_or_path)
    save_adapter(model, folder, base, state)
    facts = {"name": base, "dtype": spec.dtype, "quantize": spec.quantize, "head": spec.head, "revision": spec.revision}
    (folder / BASE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, generation_eos: Sequence[int]
) -> GenerationConfig:
    """The model's own generation configuration with every id that ends an answer, as a list."""
    config = copy.deepcopy(getattr(model, "generation_config", None))
    config = config or GenerationConfig.from_model_config(model.config)
    own: Any = config.eos_token_id
    ends = [*([] if own is None else [own] if isinstance(own, int) else own), *generation_eos]
    if not ends and tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    config.eos_token_id = list(dict.fromkeys(int(end) for end in ends)) or None
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:
        # Published models carry sampling values without do_sample, which transformers reads but refuses to write.
        config.do_sample = True
    return config


@torch.no_grad()
def largest_logit_change(before: nn.Module, after: nn.Module, documents: Sequence[Sequence[int]]) -> float:
    """The largest difference of any logit between two models.

    Arguments:
        before: a model, left in the mode it is in.
        after: another with the same outputs.
        documents: token ids to read, each on its own.

    Returns:
        The maximum over documents, positions and entries, of the absolute difference in float32.
    """
    largest = 0.0
    modes = before.training, after.training
    before.eval()
    after.eval()
    try:
        for ids in documents:
            one, other = _logits(before, ids), _logits(after, ids)
            largest = max(largest, (one - other).abs().max().item())
    finally:
        before.train(modes[0])
        after.train(modes[1])
    return largest


def _logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    return model(input_ids=tokens, use_cache=False).logits.float().cpu()
