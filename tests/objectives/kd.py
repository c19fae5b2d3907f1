"""What the ranks of the distillation tests run: real fits of the real objective, several a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny
from tests.objectives import law

LR = 0.5


def make_folder(folder: Path) -> Path:
    """A student, a wider and deeper teacher with a padded vocabulary, and rows."""
    law.make_folder(folder)
    tokenizer = tiny.make_tokenizer()
    teacher = tiny.make_model(len(tokenizer) + 24, layers=3, hidden=48, seed=5, initializer_range=0.3)
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def build(
    folder: str,
    *,
    placement: str = "replica",
    cache: str | None = None,
    lora: bool = False,
    layout: str = "packed",
    micro: int = 1,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    ce: float = 0.0,
    hidden: bool = False,
    on_policy: float = 0.0,
    val_fraction: float = 0.0,
    lr: float = LR,
    cross_tokenizer: str | None = None,
):
    """The objective and its data module, with SGD."""
    from ptl.data.module import ChatDataModule, Preparation
    from ptl.data.on_policy import OnPolicy
    from ptl.data.sources import Source
    from ptl.functional.divergence import Divergence
    from ptl.models.optimizer import Optimizer, Schedule
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.models.teachers import Teacher
    from ptl.objectives.distillation import Distillation, HiddenMatch

    adapter = LoRA(rank=4, alpha=8, init="gaussian") if lora else None
    objective = Distillation(
        ModelSpec(name=f"{folder}/model", adapter=adapter),
        Teacher(model=ModelSpec(name=f"{folder}/teacher"), placement=placement, cache=cache),  # pyright: ignore
        divergence=Divergence(kind=kind, temperature=temperature),  # pyright: ignore
        ce=ce,
        hidden=HiddenMatch(layers=[1, 2]) if hidden else None,
        cross_tokenizer=cross_tokenizer,  # pyright: ignore
        on_policy=OnPolicy(share=on_policy, max_new_tokens=8) if on_policy else None,
        optimizer=Optimizer(kind="sgd", lr=lr),
        schedule=Schedule(kind="constant", warmup=0),
    )
    data = ChatDataModule(
        [Source(path=f"{folder}/rows.jsonl")],
        max_length=256,
        layout=layout,  # pyright: ignore
        micro_batch_size=micro,
        val_fraction=val_fraction,
        preparation=Preparation(cache_dir=f"{folder}/cache", num_proc=1),
    )
    data.bind(view=objective.view, tokenizer=objective.spec.name)
    return objective, data


def trained(*args: Any, **options: Any) -> np.ndarray:
    """The trainable weights of the student after an epoch, with its teacher looked at; see ``law.trained``."""
    return law.trained(*args, make=build, at_end=_frozen, **options)


def _frozen(objective: Any) -> None:
    teacher = objective.teacher_model()
    if teacher is not None:
        assert not any(m.training for m in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def run(folder: str, out: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Entry point of a rank; see ``law.run``."""
    return law.run(folder, out, cases, train=trained)
