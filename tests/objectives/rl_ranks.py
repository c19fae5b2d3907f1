"""What the ranks of GRPO's tests run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from ptl.rewards.base import Completion, Outcome, Reward
from tests.objectives import law, rl
from tests.ranks import rank


class SaveAt(L.Callback):
    """Saves after some of the steps, and keeps what the objective says of itself then: paths by step."""

    def __init__(self, paths: dict[int, str], say: Callable[[Any], Any] = lambda objective: None) -> None:
        self.paths, self.say, self.said = paths, say, {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step in self.paths and step not in self.said:
            trainer.save_checkpoint(self.paths[step])
            self.said[step] = self.say(pl_module)


def fit(folder: str, strategy: str, steps: int, resume: str | None = None, trainer=None, **options: Any):
    L.seed_everything(7, verbose=False)
    objective, data = rl.build(folder, **{"micro": 2, **options})
    made = law.trainer_of(folder, strategy, 2, 1, max_epochs=-1, max_steps=steps, **(trainer or {}))
    made.fit(objective, datamodule=data, ckpt_path=resume)
    return objective, made


def run(folder: str, out: str) -> dict[str, Any]:
    """All scenarios in one start."""
    return {
        "same_prompt": same_prompt(folder, out),
        "few": few(folder, out),
        "resumed": {strategy: resumed(folder, out, strategy) for strategy in ("ddp", "zero3")},
        "evaluated": evaluated(folder),
    }


def same_prompt(folder: str, out: str) -> list[list[int]]:
    """Two prompts that are equal, one on each rank."""
    _rows(folder, "same.jsonl", ['{"prompt": "fox", "answer": "fox"}'] * 2)
    options = {"rows": "same.jsonl", "micro": 1, "rollout": {"group_size": 8, "max_new_tokens": 12}}
    objective, _ = fit(folder, "ddp", 1, **options)
    return [answer.ids.tolist() for group in objective.rollouts.buffer.groups for answer in group.answers]


def few(folder: str, out: str) -> int:
    """One prompt for two ranks, for two steps: one rank has nothing to answer."""
    _rows(folder, "one.jsonl", ['{"prompt": "fox", "answer": "fox"}'])
    _, trainer = fit(folder, "ddp", 2, rows="one.jsonl", micro=1)
    return trainer.global_step


def resumed(folder: str, out: str, strategy: str) -> dict[str, Any]:
    """How far the weights of a run that goes on within a rollout end from those of the one that saved there."""
    import torch

    from ptl.strategies.deepspeed import consolidated_state_dict

    options = {"minibatches": 2, "epochs": 2, "lr": 0.2}
    path = str(Path(folder) / f"{strategy}.ckpt")
    whole, _ = fit(folder, strategy, 6, trainer={"callbacks": [SaveAt({3: path})]}, **options)
    expected = consolidated_state_dict(whole.policy)
    answers = [answer.ids.tolist() for group in whole.rollouts.buffer.groups for answer in group.answers]
    again, _ = fit(folder, strategy, 6, resume=path, **options)
    found = consolidated_state_dict(again.policy)
    distance = max((float((found[k] - expected[k]).abs().max()) for k in expected), default=0.0)
    same = answers == [answer.ids.tolist() for group in again.rollouts.buffer.groups for answer in group.answers]
    torch.distributed.barrier()
    return {"distance": distance, "answers": same}


def evaluated(folder: str) -> dict[str, float]:
    from tests.objectives.test_grpo import _EVALUATION

    objective, trainer = fit(folder, "zero3", 1, data={"val_fraction": 0.3}, evaluation=_EVALUATION)
    found = trainer.validate(objective, datamodule=trainer.datamodule, verbose=False)[0]
    return {name: float(value) for name, value in found.items()}


class FailsOnTheSecondRank(Reward):
    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        if rank() == 1:
            raise ZeroDivisionError("no division")
        return [float(place) for place in range(len(completions))]


def failing(folder: str) -> dict[str, Any]:
    fit(folder, "ddp", 1, rewards=[FailsOnTheSecondRank()], micro=4)
    return {}


def _rows(folder: str, name: str, lines: Sequence[str]) -> None:
    path = Path(folder) / name
    if rank() == 0:
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in lines))
        partial.rename(path)
    import time

    while not path.exists():
        time.sleep(0.05)
    assert json.loads(path.read_text().splitlines()[0])
