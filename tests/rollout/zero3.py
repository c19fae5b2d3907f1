"""What a rank of the ZeRO-3 tests runs: engines that draw from a policy in shards, between steps of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ptl.models.heads import causal_lm
from ptl.rollout.engine import Asked, Draws
from ptl.rollout.hf_cb import HFContinuous
from ptl.rollout.weights import write_adapter, write_model
from ptl.strategies.deepspeed import ZeROStrategy, gathered_forward
from tests import ranks
from tests.strategies.scenarios import CUT_ALL, Tiny, loader, trainer

ASKED = [Asked([5, 6, 7], 1, 6), Asked([9], 2, 9)]
DRAWS = Draws(samples=2, temperature=0.7, top_p=1.0, stop=(0,), seed=3)


class Draws3(Tiny):
    """Each rank draws its own number of times, rank 0 never at first; then the weights go to files."""

    def __init__(self, folder: str, out: str, **model: Any) -> None:
        super().__init__(folder, **model)
        self.out, self.worst, self.cut = Path(out), 0.0, 0

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        strategy, rank = self.trainer.strategy, ranks.rank()
        with HFContinuous().session(self.policy, strategy, batch_idx) as draw:
            for turn in range(rank + batch_idx):
                for asked, group in zip(ASKED, draw(ASKED, DRAWS._replace(seed=turn))):
                    for answer in group:
                        self.worst = max(self.worst, self.difference(asked.ids, answer))
        folder = self.out / f"{type(self.policy).__name__}-{batch_idx}"
        if rank == 0:
            folder.mkdir(parents=True)
        write_model(self.policy, folder, torch.float32, rank == 0)
        adapted = hasattr(self.policy, "peft_config")
        if adapted:
            write_adapter(self.policy, folder, rank == 0)
        self.cut = sum(p.numel() == 0 for p in self.policy.parameters())
        with gathered_forward(strategy):
            if rank == 0:
                self.same_as_files(folder, adapted)

    def difference(self, prompt: Any, answer: Any) -> float:
        ids = torch.tensor([list(prompt) + answer.ids])
        with torch.no_grad():
            logits = causal_lm(self.policy)(input_ids=ids).logits[0].float() / DRAWS.temperature
        own = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer.ids)[:, None])[:, 0]
        return float((own - torch.tensor(answer.logprobs)).abs().max())

    def same_as_files(self, folder: Path, adapted: bool) -> None:
        files = load_file(folder / "model-00001.safetensors")
        state = causal_lm(self.policy).state_dict()
        plain = {name.replace(".base_layer.", "."): t for name, t in state.items() if "lora_" not in name}
        plain.pop("lm_head.weight")  # tied
        assert files.keys() == plain.keys() and all(torch.equal(files[name], plain[name]) for name in files)
        if adapted:
            saved = load_file(folder / "adapter_model.safetensors")
            own = {n.replace(".default.", "."): p for n, p in self.policy.named_parameters() if p.requires_grad}
            assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in saved)


def engines(folder: str, out: str) -> dict[str, Any]:
    """With and without an adapter: how far the log-probabilities are off, and losses beside those of a run alone."""
    found = {}
    for lora in (False, True):
        plain, drawn = Tiny(folder, lora=lora), Draws3(folder, out, lora=lora)
        for module in (plain, drawn):
            trainer(ZeROStrategy(stage=3, config=CUT_ALL), out, max_steps=3).fit(module, loader(3, 1))
        found[str(lora)] = {
            "worst": drawn.worst,
            "cut": drawn.cut,
            "losses": drawn.losses,
            "alone": plain.losses,
        }
    return found
