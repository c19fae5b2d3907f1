"""What the ranks of the laws' tests run: real fits of the real objective, several a start."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import tiny

STEPS = 3
LR = 0.5
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "answer", "hello", "world", "Chine"]


def write_rows(path: Path, count: int = 8 * STEPS, seed: int = 0) -> list[dict[str, Any]]:
    """Ragged conversations of one to three exchanges, some turns of which carry another weight or none."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    rows = []
    for index in range(count):
        messages: list[dict[str, Any]] = []
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": words(1, 8)})
            messages.append({"role": "assistant", "content": words(1, 24)})
        if index % 4 == 1:
            messages[-1]["train"] = 0.25
        if index % 4 == 2 and len(messages) > 2:
            messages[1]["train"] = False
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def make_folder(folder: Path) -> Path:
    """A folder with a tiny model and rows, made once by the test."""
    tiny.save_folder(folder / "model", tiny.make_tokenizer())
    write_rows(folder / "rows.jsonl")
    return folder


def build(
    folder: str,
    *,
    lora: bool = False,
    layout: str = "packed",
    pack_to: int | None = None,
    micro: int = 1,
    shared: int = 1,
    recompute: bool = False,
):
    """The objective and its data module, with SGD and no shuffle."""
    from ptl.data.module import ChatDataModule, Preparation
    from ptl.data.sources import Source
    from ptl.models.optimizer import Optimizer, Schedule
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.objectives.sft import SFT

    adapter = LoRA(rank=4, alpha=8, init="gaussian") if lora else None
    objective = SFT(
        ModelSpec(name=f"{folder}/model", adapter=adapter, gradient_checkpointing=recompute),
        optimizer=Optimizer(kind="sgd", lr=LR),
        schedule=Schedule(kind="constant", warmup=0),
        sequence_parallel=shared,
    )
    data = ChatDataModule(
        [Source(path=f"{folder}/rows.jsonl")],
        max_length=256,
        layout=layout,
        pack_to=pack_to,
        micro_batch_size=micro,
        preparation=Preparation(cache_dir=f"{folder}/cache", num_proc=1),
    )
    data.bind(view=objective.view, tokenizer=objective.spec.name)
    return objective, data


def obvious(folder: Path) -> np.ndarray:
    """The obvious loop in fp64: whole logits, one row at a time, sum over the window over its weight, plain SGD."""
    import torch
    from transformers import AutoModelForCausalLM

    _, data = build(str(folder))
    data.prepare()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").double()
    batches = list(data.train_dataloader())
    assert len(batches) == 8 * STEPS
    for step in range(STEPS):
        window = batches[8 * step : 8 * step + 8]
        total, weight = 0.0, 0.0
        for batch in window:
            logp = model(batch.input_ids).logits[0, :-1].log_softmax(-1)
            nll = -logp.gather(1, batch.input_ids[0, 1:, None])[:, 0]
            total = total + (nll * batch.loss_mask[0, 1:]).sum()
            weight += float(batch.loss_mask[0, 1:].sum())
        (total / weight).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LR * parameter.grad
                parameter.grad = None
    return flat({k: v.detach() for k, v in model.state_dict(keep_vars=True).items() if v.requires_grad})


def trainer_of(folder: str, strategy: str, world_size: int, accumulate: int, **kwargs: Any):
    import lightning as L

    from ptl.strategies.deepspeed import ZeROStrategy

    chosen: Any = strategy
    if strategy.startswith("zero"):
        chosen = ZeROStrategy(stage=int(strategy[-1]))  # pyright: ignore[reportArgumentType]
    defaults: dict[str, Any] = dict(
        accelerator="cpu",
        devices=world_size,
        strategy=chosen,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    return L.Trainer(**{**defaults, **kwargs})


def trained(
    folder: str,
    strategy: str,
    world_size: int,
    accumulate: int,
    micro: int,
    seed: int = 7,
    make: Callable[..., Any] | None = None,
    at_end: Callable[[Any], None] | None = None,
    callbacks: list[Any] | None = None,
    steps: int = STEPS,
    **options: Any,
) -> np.ndarray:
    """The trainable weights after an epoch, flat in order of their names; empty on other ranks than the first.

    ``make`` builds the objective and its data in place of ``build``; ``at_end`` is given the trained objective; an
    epoch has ``steps`` optimizer steps.
    """
    import lightning as L

    from ptl.strategies.deepspeed import consolidated_state_dict

    L.seed_everything(seed, verbose=False)
    objective, data = (make or build)(folder, micro=micro, **options)
    seen: list[np.ndarray] = []

    class Keep(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            state = consolidated_state_dict(pl_module.policy, trainable_only=True)
            seen.append(flat(state) if state else np.zeros(0))
            if at_end is not None:
                at_end(pl_module)

    trainer = trainer_of(folder, strategy, world_size, accumulate, callbacks=[Keep(), *(callbacks or [])])
    trainer.fit(objective, datamodule=data)
    assert trainer.global_step == steps, trainer.global_step
    return seen[0]


def flat(state: dict[str, Any]) -> np.ndarray:
    """Tensors as one fp64 vector; a tied matrix, listed under two names, counts once."""
    unique = {(t.data_ptr() if t.numel() else name): name for name, t in sorted(state.items(), reverse=True)}
    return np.concatenate([state[name].double().cpu().numpy().ravel() for name in sorted(unique.values())])


def run(
    folder: str, out: str, cases: list[dict[str, Any]], train: Callable[..., np.ndarray] = trained
) -> dict[str, Any]:
    """Entry point of a rank: trains each case, and the first rank saves the weights as ``OUT/<name>.npy``."""
    import os

    for case in cases:
        options = {k: v for k, v in case.items() if k != "name"}
        weights = train(folder, **options)
        if int(os.environ.get("RANK", "0")) == 0:
            np.save(Path(out) / f"{case['name']}.npy", weights)
    return {"cases": [case["name"] for case in cases]}
