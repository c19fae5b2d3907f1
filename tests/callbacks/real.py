"""The real objective, data and model parts, tiny; importable by rank processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ptl.data.module import ChatDataModule
from ptl.data.parts import Preparation
from ptl.data.sources import Source
from ptl.models.optimizer import Optimizer, Schedule
from ptl.models.spec import LoRA, ModelSpec
from ptl.objectives.sft import SFT
from tests import tiny

QUESTIONS = ["What is 2+2?", "Where is Shanghai, the very large city ?", "hello"]
ANSWERS = ["The answer is 4.", "In China.", "hello world"]


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A model folder and a file of conversations, made once."""
    model, data = folder / "model", folder / "chat.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_folder(model, tiny.make_tokenizer(), layers=2, hidden=64)
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in zip(QUESTIONS * 4, ANSWERS * 4, strict=True)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    return model, data


def sft(model: Path, *, lora: LoRA | None = None, lr: float = 1e-2, **options) -> SFT:
    torch.manual_seed(3)
    spec = ModelSpec(name=str(model), adapter=lora, **options)
    return SFT(spec, optimizer=Optimizer(lr=lr), schedule=Schedule(kind="constant", warmup=0))


def chat(model: Path, data: Path, *, val: bool = False, micro_batch_size: int = 3, **options) -> ChatDataModule:
    return ChatDataModule(
        [Source(path=str(data))],
        val=[Source(path=str(data), limit=3)] if val else None,
        tokenizer=str(model),
        micro_batch_size=micro_batch_size,
        preparation=Preparation(cache_dir=str(data.parent / "cache"), num_proc=1),
        **options,
    )
