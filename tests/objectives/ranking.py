"""What the ranks of the tests on rankings run: real fits of reward modelling and DPO, several a start."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny
from tests.objectives import law

LR = {"reward": 0.2, "dpo": 0.5}
BETA = 0.3


def write_rows(path: Path, count: int = 8 * law.STEPS, seed: int = 0) -> list[dict[str, Any]]:
    """Two to five ragged answers a prompt, with ties, gaps and scores, over prompts of one or more turns."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(law.WORDS, k=rng.randint(least, most)))

    rows = []
    for index in range(count):
        prompt: list[dict[str, Any]] = []
        if index % 3 == 0:
            prompt = [{"role": "user", "content": words(1, 6)}, {"role": "assistant", "content": words(1, 6)}]
        prompt.append({"role": "user", "content": words(1, 8)})
        answers = rng.randint(2, 5)
        ranks: list[int | None] = [rng.randint(1, 3) for _ in range(answers)]
        if answers > 2 and index % 4 == 1:
            ranks[rng.randrange(answers)] = None
        rows.append({"prompt": prompt, "completions": [words(1, 20) for _ in range(answers)], "ranks": ranks})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def make_folder(folder: Path) -> Path:
    """A tiny language model, a reward model made of it, another model as a reference, and rows."""
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer = tiny.make_tokenizer()
    tiny.save_folder(folder / "model", tokenizer)
    tiny.save_folder(folder / "reference", tokenizer, seed=3, layers=3)
    torch.manual_seed(5)
    scored = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    torch.nn.init.normal_(scored.score.weight, std=0.2)
    scored.save_pretrained(folder / "scored")
    tokenizer.save_pretrained(folder / "scored")
    rows = write_rows(folder / "rows.jsonl")
    (folder / "partial.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-3]))
    return folder


def build(
    folder: str,
    *,
    objective: str = "reward",
    model: str | None = None,
    lora: bool = False,
    quantize: str | None = None,
    reference: str | None = None,
    placement: str = "replica",
    layout: str = "packed",
    share: bool = True,
    micro: int = 1,
    rows: str = "rows.jsonl",
    val_fraction: float = 0.0,
    lr: float | None = None,
    sgd: bool = True,
    **options: Any,
):
    """The objective and its data module, with SGD."""
    from ptl.data.module import ChatDataModule, Preparation
    from ptl.data.sources import Source
    from ptl.models.optimizer import Optimizer, Schedule
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.models.teachers import Teacher
    from ptl.objectives.dpo import DPO
    from ptl.objectives.reward import RewardModeling

    adapter = LoRA(rank=4, alpha=8, init="gaussian") if lora else None
    how: dict[str, Any] = {
        "share_prompt": share,
        "optimizer": Optimizer(kind="sgd" if sgd else "adamw", lr=lr or LR[objective]),  # pyright: ignore
        "schedule": Schedule(kind="constant", warmup=0),
        **options,
    }
    name = model or ("scored" if objective == "reward" else "model")
    spec = ModelSpec(name=f"{folder}/{name}", adapter=adapter, quantize=quantize)  # pyright: ignore
    if objective == "reward":
        made: Any = RewardModeling(spec, **how)
    else:
        held_to = Teacher(model=ModelSpec(name=f"{folder}/{reference}"), placement=placement) if reference else None  # pyright: ignore
        made = DPO(spec, reference=held_to, **{"beta": BETA, **how})
    data = ChatDataModule(
        [Source(path=f"{folder}/{rows}")],
        max_length=256,
        layout=layout,  # pyright: ignore
        micro_batch_size=micro,
        val_fraction=val_fraction,
        preparation=Preparation(cache_dir=f"{folder}/cache", num_proc=1),
    )
    data.bind(view=made.view, tokenizer=made.spec.name)
    return made, data


def trained(*args: Any, **options: Any) -> np.ndarray:
    """The trainable weights after an epoch; a frozen reference is looked at. See ``law.trained``."""
    return law.trained(*args, make=partial(build), at_end=frozen, **options)


def frozen(objective: Any) -> None:
    """No reference is in training mode, has a gradient, or is among the objective's parameters."""
    held = getattr(objective, "_reference", None)
    live = held.live if held is not None else None
    if live is None:
        return
    own = {id(p) for p in objective.parameters()}
    assert not any(m.training for m in live.model.modules())
    assert not any(p.requires_grad or p.grad is not None or id(p) in own for p in live.model.parameters())


def run(folder: str, out: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Entry point of a rank; see ``law.run``."""
    return law.run(folder, out, cases, train=trained)
