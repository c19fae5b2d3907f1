"""The frozen model that a policy is held to: what it was before training, or another one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptl.models.adapters import adapter_disabled
from ptl.models.logprobs import answer_logprobs, side_logprobs
from ptl.models.modes import evaluating
from ptl.models.spec import ModelSpec
from ptl.models.teachers import Teacher
from ptl.objectives.live_teacher import LiveTeacher
from ptl.types import GroupBatch


class Reference:
    """Log-probabilities under the reference. It is no ``nn.Module``: nothing trains it, saves it or switches its mode.

    Arguments:
        policy: the model that is trained.
        model: the reference. None is the policy before training: with an adapter the base under it, computed with the
            adapter off; without one, a frozen copy.

    Attributes:
        is_start: whether it is the policy before training, so that nothing lies between the two at the first step.

    Raises:
        ValueError: ``model`` names a cache of distributions.
    """

    def __init__(self, policy: ModelSpec, model: Teacher | None = None) -> None:
        if model is not None and model.cache is not None:
            raise ValueError("model.reference.cache holds distributions; a reference is a model: set reference.model")
        self.is_start = model is None
        self._spec = Teacher(model=policy) if model is None and policy.adapter is None else model
        self.live: LiveTeacher | None = None

    def build(self, policy: nn.Module) -> None:
        """Loads it where it is a model of its own; again for each loop, at no cost."""
        if self._spec is not None and self.live is None:
            self.live = LiveTeacher(self._spec, beside=policy)

    def close(self) -> None:
        """Lets go of a sharded one, whose shards go with the process group; the next loop makes another."""
        if self.live is not None and self._spec is not None and self._spec.placement == "sharded":
            self.live.close()
            self.live = None

    @torch.no_grad()
    def logprobs(self, policy: nn.Module, batch: GroupBatch, temperature: float = 1.0) -> Tensor:
        """Log-probability of each trained token of the answers, float32 [M], at a temperature."""
        if self.live is None:
            with evaluating(policy), adapter_disabled(policy):
                return answer_logprobs(policy, batch, temperature)
        self.live.place(batch.targets.device)
        states, _ = self.live.states(batch.tokens, batch.predicted_from, parents=batch.parents)
        with self.live.side(states) as side:
            return side_logprobs(side, batch.targets, temperature)
