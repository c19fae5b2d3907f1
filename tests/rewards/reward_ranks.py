"""What a rank of ``test_reward_model`` runs: a reward model asked while ZeRO-3 trains another one."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from ptl.rewards.base import Completion
from ptl.types import Message, Origin, Prompt
from tests.ranks import rank
from tests.strategies.scenarios import CUT_ALL, Batch, Tiny, loader, trainer


def completions(texts: list[str]) -> list[Completion]:
    prompt = Prompt(messages=(Message(role="user", content="hello"),), origin=Origin("q.jsonl", 1))
    return [Completion(prompt=prompt, text=text) for text in texts]


class Asking(Tiny):
    """Asks the rewards in every step, each rank about answers of its own."""

    def __init__(self, folder: str, rewards: dict[str, Any], texts: list[str]) -> None:
        super().__init__(folder)
        self.rewards, self.texts = rewards, texts
        self.scores: dict[str, list[list[float]]] = {name: [] for name in rewards}
        self.announced = True

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        for name, reward in self.rewards.items():
            if rank() == 0 or name != "rank 0":  # one rank alone may ask: nothing is a collective
                self.scores[name].append(list(reward.score(completions(self.texts))))
        self.announced &= is_deepspeed_zero3_enabled()
        return super().training_step(batch, batch_idx)


def scores(folder: str, plain: str, adapter: str, out: str, texts: list[list[str]]) -> dict[str, Any]:
    """The scores of each step by reward, on this rank's texts, and what ZeRO-3 did to the models."""
    from ptl.rewards.reward_model import RewardModel
    from ptl.strategies.deepspeed import ZeROStrategy

    rewards = {
        "plain": RewardModel(model=plain, device="cpu"),
        "adapter": RewardModel(model=adapter, device="cpu"),
        "rank 0": RewardModel(model=plain, device="cpu"),
    }
    module = Asking(folder, rewards, texts[rank()])
    trainer(ZeROStrategy(stage=3, config=CUT_ALL), out, max_epochs=1).fit(module, loader(4, 1))
    opened = [member.model for reward in rewards.values() for member in reward._members or ()]
    return {
        "scores": module.scores,
        "sharded policy": all(hasattr(p, "ds_id") for p in module.policy.parameters()),
        "sharded rewards": sum(hasattr(p, "ds_id") for model in opened for p in model.parameters()),
        "head": sorted({str(model.score.weight.dtype) for model in opened if hasattr(model.score, "weight")}),
        "announced": module.announced,
        "steps": module.global_step,
        "losses": module.losses,
    }
