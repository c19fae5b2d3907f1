"""A policy's weights as files, which an engine in another process reads: no copy of the policy in this one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from ptl.models.adapters import save_adapter
from ptl.models.heads import causal_lm
from ptl.rollout.ranks import agreed
from ptl.strategies.partition import gathered

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

SHARD_BYTES = 4 * 2**30
"""Of a file; as much is held in memory beside what is written."""


@contextmanager
def shared_folder(parent: str, name: str, strategy: Strategy, writes: bool) -> Iterator[Path]:
    """A folder that one rank of those that see it makes, with its parents, and removes; all enter together."""
    folder = Path(parent).absolute() / name  # a server may stand in another place
    agreed(strategy, lambda: folder.mkdir(mode=0o700, parents=True) if writes else None)
    try:
        yield folder
    finally:
        if writes:
            shutil.rmtree(folder, ignore_errors=True)


def write_model(policy: nn.Module, folder: Path, dtype: torch.dtype, writes: bool, *, untied: bool = False) -> None:
    """Writes a plain Hugging Face folder of the policy without its adapter, in the names of published checkpoints.

    Parameters that ZeRO-3 has cut are made whole one at a time. All ranks call this; the files are of those that
    write.

    Args:
        policy: with or without an adapter.
        folder: exists and is empty.
        dtype: of the weights in the files.
        writes: whether this rank writes.
        untied: write a matrix that is embedding and head at the same time twice, as two.
    """
    lm = causal_lm(policy)
    files = _Files(folder)

    def put(name: str, tensor: Tensor) -> None:
        whole = tensor.detach().to("cpu", dtype if isinstance(tensor, nn.Parameter) else None, copy=True)
        for published, part in revert_weight_conversion(lm, {name: whole}).items():
            files.put(published, part)

    _each_whole(_plain(lm, untied), put if writes else None)
    if writes:
        files.finish()
        config = type(lm.config).from_dict(lm.config.to_dict())
        config.architectures, config.dtype = [type(lm).__name__], dtype
        if untied:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        config.save_pretrained(folder)


def write_adapter(policy: nn.Module, folder: Path, writes: bool) -> None:
    """Writes the policy's adapter as peft reads it. All ranks call this; the files are of those that write."""
    state: dict[str, Tensor] = {}
    trained = ((name, p) for name, p in policy.state_dict(keep_vars=True).items() if p.requires_grad)
    put = (lambda name, tensor: state.update({name: tensor.detach().to("cpu", copy=True)})) if writes else None
    _each_whole(trained, put)
    if writes:
        save_adapter(policy, folder, "policy", state)


def tied(policy: nn.Module) -> bool:
    """Whether embedding and head are one matrix."""
    lm = causal_lm(policy)
    head = lm.get_output_embeddings()
    return head is not None and head.weight is lm.get_input_embeddings().weight


def _plain(lm: Any, untied: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers under the names that they have without an adapter, a tied one once unless ``untied``."""
    seen: set[int] = set()
    for name, tensor in lm.state_dict(keep_vars=True).items():
        if any(part.startswith("lora_") for part in name.split(".")):
            continue
        if untied or id(tensor) not in seen:
            seen.add(id(tensor))
            yield name.replace(".base_layer.", "."), tensor


def _each_whole(named: Iterable[tuple[str, Tensor]], put: Callable[[str, Tensor], None] | None) -> None:
    """Hands tensors over one at a time, whole. After an error this rank still walks to the end with the others."""
    error: Exception | None = None
    for name, tensor in named:
        with gathered([tensor]):
            if put is not None and error is None:
                try:
                    put(name, tensor)
                except Exception as raised:
                    error = raised
    if error is not None:
        raise error


class _Files:
    """Safetensors files in a folder, each written when it is full, and their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[str, Tensor] = {}
        self.file_of: dict[str, str] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor.contiguous()
        if sum(t.nbytes for t in self.waiting.values()) >= SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        index = json.dumps({"metadata": {}, "weight_map": self.file_of}, indent=2)
        (self.folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self.waiting:
            file = f"model-{len(set(self.file_of.values())) + 1:05}.safetensors"
            save_file(self.waiting, self.folder / file, metadata={"format": "pt"})
            self.file_of |= dict.fromkeys(self.waiting, file)
            self.waiting = {}
