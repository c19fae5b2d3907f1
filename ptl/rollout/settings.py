"""How answers are sampled for training, as plain values that a YAML can hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How answers are sampled for training, and for how many steps they serve.

    Attributes:
        group_size: answers to each prompt.
        max_new_tokens: most tokens of an answer.
        temperature: T of ``softmax(z / T)``, which is drawn from and trained, above 0.
        top_p: 1; see below.
        minibatches: optimizer steps that the prompts of a rollout are cut into. Above 1, all but the first step train
            on answers of older weights.
        epochs: how often a rollout's steps are walked.
        refill: most times that a prompt is replaced by another one because its answers all have the same reward
            (dynamic sampling; DAPO, arXiv:2503.14476, section 3.2); 0 trains on what comes.
        mask_truncated: leave answers out that reached their limit before their end.
        seed: of the draws.
        share_prompt: in the packed layout, compute a prompt once for all its answers while training.

    Raises:
        ValueError: a number out of its range.
    """

    group_size: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    minibatches: int = 1
    epochs: int = 1
    refill: int = 0
    mask_truncated: bool = False
    seed: int = 0
    share_prompt: bool = True

    def __post_init__(self) -> None:
        least = {"group_size": 1, "max_new_tokens": 1, "minibatches": 1, "epochs": 1, "refill": 0, "seed": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ValueError(f"model.rollout.{name} must be {number} or more, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"model.rollout.temperature must be above 0, got {self.temperature}")
        if self.top_p != 1:
            raise ValueError(
                f"model.rollout.top_p is {self.top_p}: with less than 1, what is sampled is another distribution than "
                "what is trained, and no weight makes up for tokens that are never drawn. Leave it at 1; "
                "model.evaluation.top_p is free"
            )
