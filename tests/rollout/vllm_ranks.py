"""What each of two ranks runs that has a vLLM of its own: it draws between the steps of a training."""

from __future__ import annotations

from typing import Any

from ptl.rollout.vllm import VLLM
from ptl.strategies.deepspeed import ZeROStrategy, gathered_forward
from tests import ranks
from tests.rollout.zero3 import ASKED, DRAWS, Draws3
from tests.strategies.scenarios import CUT_ALL, loader, trainer


class Beside(Draws3):
    """Draws after each step, rank 1 more often, and compares the log-probabilities with the policy's own."""

    def __init__(self, folder: str, out: str, **model: Any) -> None:
        super().__init__(folder, out, **model)
        self.engine = VLLM(kv_cache_gib=0.05, max_model_len=64, enforce_eager=True)
        self.said: list[list[list[int]]] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super(Draws3, self).on_train_batch_end(outputs, batch, batch_idx)
        strategy = self.trainer.strategy
        found = []
        with self.engine.session(self.policy, strategy, batch_idx) as draw:
            for turn in range(1 + ranks.rank()):
                found.append(draw(ASKED, DRAWS._replace(seed=turn)))
        self.cut = sum(p.numel() == 0 for p in self.policy.parameters())
        with gathered_forward(strategy):
            for groups in found:
                for asked, group in zip(ASKED, groups, strict=True):
                    self.said.append([answer.ids for answer in group])
                    for answer in group:
                        self.worst = max(self.worst, self.difference(asked.ids, answer))


def beside(folder: str, out: str) -> dict[str, Any]:
    """DDP with all weights and ZeRO-3 with an adapter: how far the log-probabilities are off, and what was said."""
    cases = {"ddp": ("ddp", False), "zero3": (ZeROStrategy(stage=3, config=CUT_ALL), True)}
    results = {}
    for name, (strategy, lora) in cases.items():
        module = Beside(folder, f"{out}/{name}", lora=lora)
        try:
            trainer(strategy, out, max_steps=2).fit(module, loader(2, 1))
        finally:
            module.engine.close()
        results[name] = {"worst": module.worst, "cut": module.cut, "said": module.said, "losses": module.losses}
    return results
