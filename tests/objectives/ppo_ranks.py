"""What the ranks of PPO's tests run beside the cases of its laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from tests.objectives import law, ppo_rl
from tests.objectives.rl_ranks import SaveAt

STEPS = 6
HOW: dict[str, Any] = {"micro": 2, "rollout": {"minibatches": 2, "epochs": 2}, "sgd": False, "lr": 1e-2}
"""Two steps of prompts, walked twice: a rollout serves four steps."""


def fit(folder: str, strategy: str, steps: int, *callbacks: L.Callback, resume: str | None = None, **options: Any):
    L.seed_everything(7, verbose=False)
    objective, data = ppo_rl.build(folder, **{**HOW, **options})
    made = law.trainer_of(folder, strategy, 2, 1, max_epochs=-1, max_steps=steps, callbacks=[*callbacks])
    made.fit(objective, datamodule=data, ckpt_path=resume)
    return objective, made


def resumed(folder: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """By case, how runs that go on after some of the steps compare with the one that saved there."""
    return {case["name"]: _resumed(folder, **case) for case in cases}


def _resumed(folder: str, name: str, strategy: str, stops: list[int], **options: Any) -> dict[str, Any]:
    import torch

    save = SaveAt({stop: str(Path(folder) / f"{name}-{stop}.ckpt") for stop in stops}, copied)
    whole, _ = fit(folder, strategy, STEPS, save, **options)
    expected = weights(whole)
    found: dict[str, Any] = {}
    for stop in stops:
        again, _ = fit(folder, strategy, STEPS, resume=save.paths[stop], **options)
        found[str(stop)] = {
            "distance": distance(weights(again), expected),
            "moved": distance(save.said[stop], expected),
            "answers": answers(again) == answers(whole),
            "targets": targets(again) == targets(whole),
            "normaliser": again.normaliser.state_dict() == whole.normaliser.state_dict(),
            "kl": again.kl.value == whole.kl.value,
        }
        torch.distributed.barrier()
    return found


def weights(objective: Any) -> dict[str, Any]:
    """Policy and critic, whole; empty on other ranks than the first under ZeRO. All ranks call it."""
    from ptl.strategies.deepspeed import consolidated_state_dict

    critic = objective.critic if objective.critic_spec is not None else objective.value_head
    parts = {"policy": objective.policy, "critic": critic}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in consolidated_state_dict(module).items()
    }


def copied(objective: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in weights(objective).items()}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two weights of one name."""
    assert one.keys() == other.keys()
    return max((float((one[name] - other[name]).abs().max()) for name in one), default=0.0)


def answers(objective: Any) -> list[list[int]]:
    return [answer.ids.tolist() for group in objective.rollouts.buffer.groups for answer in group.answers]


def targets(objective: Any) -> list[list[float]]:
    """What the critic's and the policy's losses hold this rank's tokens to."""
    return [
        answer.tokens[name].tolist()
        for name in ("advantages", "returns", "values")
        for group in objective.rollouts.buffer.groups
        for answer in group.answers
    ]
