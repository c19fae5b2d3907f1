"""What the ranks of PPO's tests run: real fits of the real objective, several a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.objectives import law, rl

LR = 0.3
LONGEST, GROUP = 12, 2
COEFFICIENT, TARGET, HORIZON = 0.2, 0.5, 32
CLIP, PENALTY, DISCOUNT, DECAY, VALUE_CLIP, VALUE_FACTOR = 1.5, 0.5, 0.97, 0.9, 0.2, 0.5
PTX_ROWS, PTX_FACTOR = 6, 0.7
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + (' <|im_end|> ' if m['role'] == 'assistant' else ' ? ') }}{% endfor %}"
)
"""Prints an answer where the prompt's end is, which conversations to learn from need."""


def make_folder(folder: Path) -> Path:
    """The models and prompts of ``rl.make_folder``, a reward model of the same vocabulary, and conversations."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rl.make_folder(folder)
    torch.manual_seed(5)
    scored = AutoModelForSequenceClassification.from_pretrained(folder / "reference", num_labels=1)
    torch.nn.init.normal_(scored.score.weight, std=0.1)
    scored.save_pretrained(folder / "critic")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    for name in ("model", "critic"):
        tokenizer.save_pretrained(folder / name)
    rows = law.write_rows(folder / "chats.jsonl", count=20)
    assert len({len(row["messages"]) for row in rows}) > 1
    return folder


def build(
    folder: str,
    *,
    micro: int = 1,
    lora: bool = False,
    critic: str | None = None,
    quantize: Any = None,
    ptx: bool = False,
    plain: bool = False,
    layout: str = "packed",
    rows: str = "rows.jsonl",
    rollout: dict[str, Any] | None = None,
    lr: float = LR,
    sgd: bool = True,
    data: dict[str, Any] | None = None,
    **options: Any,
):
    """PPO and its data module, with SGD and two ragged answers to a prompt.

    ``plain`` leaves out the divergence, the normaliser and the penalty. ``quantize`` keeps policy and critic in codes,
    each under an adapter.
    """
    from ptl.data.sources import Source
    from ptl.functional.kl import AdaptiveKL
    from ptl.models.optimizer import Optimizer, Schedule
    from ptl.models.spec import LoRA, ModelSpec
    from ptl.objectives.ppo import PPO
    from ptl.objectives.ptx import PTX
    from ptl.rollout.selfcheck import SelfCheck
    from ptl.rollout.settings import Rollout

    adapter = LoRA(rank=4, alpha=8) if lora or quantize else None
    how: dict[str, Any] = {
        "discount": DISCOUNT,
        "decay": DECAY,
        "value_clip": VALUE_CLIP,
        "value_factor": VALUE_FACTOR,
        "optimizer": Optimizer(kind="sgd" if sgd else "adamw", lr=lr),
        "schedule": Schedule(kind="constant", warmup=0),
        "self_check": SelfCheck(min_finished=0.0),
    }
    if not plain:
        how["kl"] = AdaptiveKL(COEFFICIENT, target=TARGET, horizon=HORIZON)
        how |= {"normalise_rewards": CLIP, "missing_end_penalty": PENALTY}
    if critic is not None:
        how["critic"] = ModelSpec(
            name=f"{folder}/{critic}", quantize=quantize, adapter=LoRA(rank=4, alpha=8) if quantize else None
        )
    if ptx:
        how["ptx"] = PTX(sources=[Source(path=f"{folder}/chats.jsonl")], factor=PTX_FACTOR, rows=PTX_ROWS)
    objective = PPO(
        ModelSpec(name=f"{folder}/model", adapter=adapter, quantize=quantize),
        options.pop("rewards", None) or [rl.Vowels()],
        rollout=Rollout(**{"group_size": GROUP, "max_new_tokens": LONGEST, **(rollout or {})}),
        **{**how, **options},
    )
    return objective, rl.data_of(folder, objective.view, micro=micro, rows=rows, layout=layout, **(data or {}))


def critic_weights(objective: Any) -> np.ndarray:
    """What the critic has that is trained, flat; empty on other ranks than the first. All ranks call it."""
    from ptl.strategies.deepspeed import consolidated_state_dict

    critic = objective.critic if objective.critic_spec is not None else objective.value_head
    state = consolidated_state_dict(critic, trainable_only=True)
    return law.flat(state) if state else np.zeros(0)


def trained(folder: str, *args: Any, record: str | None = None, **options: Any) -> np.ndarray:
    """The policy's and the critic's weights after an epoch; what was sampled goes to the file ``record``."""
    critic: list[np.ndarray] = []

    def at_end(objective: Any) -> None:
        critic.append(critic_weights(objective))
        held = objective._reference.live if objective._reference is not None else None
        if held is not None:
            own = {id(p) for p in objective.parameters()}
            assert not any(module.training for module in held.model.modules())
            assert not any(p.requires_grad or p.grad is not None or id(p) in own for p in held.model.parameters())

    callbacks = [rl.Recorder(Path(record))] if record else []
    policy = law.trained(folder, *args, make=build, at_end=at_end, callbacks=callbacks, **options)
    return np.concatenate([policy, critic[0]])


def run(folder: str, out: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Entry point of a rank; see ``law.run``."""
    return law.run(folder, out, cases, train=trained)


def rollouts_of(path: Path) -> list[dict[str, Any]]:
    """What ``rl.Recorder`` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]
