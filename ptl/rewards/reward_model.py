"""A reward that is a trained reward model, or several."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ptl.data.render import RenderError
from ptl.data.reward_models import RewardModel as Opened
from ptl.data.reward_models import find_reward_model, open_reward_model, reward_renderer
from ptl.data.scored_answers import Scored, score_answers
from ptl.models.names import resolve_model
from ptl.models.spec import Quantization
from ptl.models.zero3 import zero3_hidden
from ptl.rewards.answers import CLOSE, OPEN, opens_thought, said
from ptl.rewards.base import Completion, Failure, Outcome, Reward

_LOG = logging.getLogger(__name__)


class RewardModel(Reward):
    """The score of a reward model, or of several as one, for the prompt's turns and the answer as the assistant's turn.

    The conversation is printed and tokenised anew with the reward model's own template and tokenizer, which may differ
    from the policy's, as in its training (``ptl.data.render``). What is scored is what the answer says behind its think
    block, as in all rewards, so that thoughts are not written for a judge; an answer that never ends its thought says
    nothing, and nothing is scored like any other answer, as an empty one is.

    The model is frozen, in eval mode, in its own dtype whatever the trainer's precision, with its head in fp32. It is
    loaded whole on every rank when it is first asked, and freed by ``close``. Each distinct conversation is computed
    once.

    An answer fails as ``too_long`` where its conversation is longer than the model's window; as ``end_inside`` where it
    spells out the model's end of a turn, behind which it could praise itself in another's name; and with the renderer's
    reason where the model's template cannot print it. What the window does is measured over all answers that were
    asked about: ``<name>_too_long`` is the share that failed for it, ``<name>_cut`` the share that was scored without
    the oldest turns of its prompt.

    Arguments:
        model: run folder, export, adapter folder or hub name of a reward model; or a list of them.
        combine: of several, ``mean`` or ``min``, the cautious one. Their scores are put on one scale before, each in
            deviations from its mean, as ``ptl_reward.json`` gives them (Coste et al., arXiv:2310.02743).
        thoughts: score the think block too, for a reward model that was trained on answers with theirs. One that the
            prompt opened is opened again in the answer.
        cut: of a conversation that is too long drop the oldest exchanges of its prompt, as few as let it fit, instead
            of failing. An answer is never cut. The first is told, and at the end how many there were.
        batch_tokens: most tokens of a forward pass; one conversation alone may have more.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where there is one.
        quantize: keep the linear layers in codes, ``nf4`` or ``int8``, on the current CUDA device where there is one;
            a folder that is in codes keeps its own.
        weight, name: as in ``Reward``.

    Raises:
        ValueError: an argument out of its range; a folder that is not there, is no reward model, has no chat template
            or another than it was trained with; of several, one whose scale is not known. Of a hub name this is found
            when the model is first asked.
    """

    seconds = None
    measured = ("cut", "too_long")

    def __init__(
        self,
        *,
        model: str | list[str],
        combine: Literal["mean", "min"] = "mean",
        thoughts: bool = False,
        cut: bool = False,
        batch_tokens: int = 16384,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        quantize: Quantization | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, name=name)
        self.models = (model,) if isinstance(model, str) else tuple(model)
        if not self.models or not all(self.models) or len(set(self.models)) < len(self.models):
            raise ValueError(f"RewardModel.model must name one reward model, or several different ones, got {model!r}")
        for key, value, known in (
            ("combine", combine, ("mean", "min")),
            ("device", device, ("auto", "cpu", "cuda")),
            ("quantize", quantize, (None, "nf4", "int8")),
        ):
            if value not in known:
                raise ValueError(f"RewardModel.{key} must be one of {', '.join(map(str, known))}, got {value!r}")
        if batch_tokens < 1:
            raise ValueError(f"RewardModel.batch_tokens must be 1 or more, got {batch_tokens}")
        if quantize is not None and find_spec("bitsandbytes") is None:
            raise ValueError(f"quantize {quantize} needs bitsandbytes: pip install 'ptl[quantize]', or remove quantize")
        self.combine, self.thoughts, self.cut = combine, thoughts, cut
        self.batch_tokens, self.device = batch_tokens, device
        self.quantize: Quantization | None = quantize
        self._members: list[Opened] | None = None
        self._keeper = nn.Module()  # of the trainer's announcement of ZeRO-3; it must live as long as the reward
        self._shortened = self._asked = 0
        self._measures: dict[str, tuple[float, float]] = {}
        for one in self.models:
            if Path(resolve_model(one).name).is_dir():
                self._check_scale(one, reward_renderer(find_reward_model(one).name)[1])

    def score(self, completions: Sequence[Completion]) -> list[Outcome]:
        if not completions:
            return []
        judged = [self._judge(member, completions) for member in self._open()]
        outcomes: list[Outcome] = [self._outcome(own) for own in zip(*judged)]
        shortened = [
            isinstance(outcome, float) and any(isinstance(one, Scored) and one.shortened for one in own)
            for outcome, own in zip(outcomes, zip(*judged))
        ]
        too_long = sum(isinstance(outcome, Failure) and outcome.reason == "too_long" for outcome in outcomes)
        number = float(len(outcomes))
        self._measures = {"cut": (float(sum(shortened)), number), "too_long": (float(too_long), number)}
        self._tell(completions, shortened)
        return outcomes

    def take_measures(self) -> dict[str, tuple[float, float]]:
        measures, self._measures = self._measures, {}
        return measures

    def close(self) -> None:
        if self._shortened:
            told = "The reward %s scored %d of %d answers without the oldest turns of their prompts."
            _LOG.warning(told, self.name, self._shortened, self._asked)
        self._members, self._shortened, self._asked = None, 0, 0

    # ---- the models ----

    def _check_scale(self, model: str, facts: Mapping[str, Any] | None) -> None:
        known = facts or {}
        if len(self.models) > 1 and not (known.get("std") and known.get("mean") is not None):
            raise ValueError(
                f"RewardModel.model: {model} has no mean and deviation in its ptl_reward.json, so its scores cannot be "
                "put on one scale with the others'; name one model alone, or list each as a reward with its own weight"
            )

    def _open(self) -> list[Opened]:
        """The models, loaded the first time."""
        if self._members is None:
            with zero3_hidden(self._keeper):
                members = [open_reward_model(one, quantize=self.quantize, device=self.device) for one in self.models]
            for member in members:
                member.model.requires_grad_(False)
                self._check_scale(member.name, member.facts)
            self._members = members
        return self._members

    # ---- the scores ----

    def _judge(self, member: Opened, completions: Sequence[Completion]) -> list[Scored | RenderError]:
        """What one model says of each answer."""
        device = next(member.model.parameters()).device
        try:
            with torch.autocast(device.type, enabled=False):  # the trainer's precision is the policy's
                return score_answers(
                    member,
                    [completion.prompt for completion in completions],
                    [self._said(completion) for completion in completions],
                    batch_tokens=self.batch_tokens,
                    cut=self.cut,
                )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"there is no memory left to score answers with {member.name}: lower batch_tokens of the reward "
                f"{self.name} (it is {self.batch_tokens}), set its quantize to nf4, or its device to cpu"
            ) from error

    def _said(self, completion: Completion) -> str:
        """What of the answer is scored."""
        text, prompt = completion.text, completion.prompt_text
        opened = opens_thought(completion)
        if self.thoughts:
            return prompt[prompt.rindex(OPEN) :] + text if opened else text
        return (said(completion) or "") if opened or OPEN in text or CLOSE in text else text

    def _outcome(self, judged: Sequence[Scored | RenderError]) -> float | Failure:
        """One number of what the models say of an answer."""
        scaled = []
        for member, one in zip(self._open(), judged):
            if isinstance(one, RenderError):
                who = f"for {member.name}: " if len(self.models) > 1 else ""
                return Failure(one.reason, who + one.detail)
            facts = member.facts or {}
            scaled.append((one.value - facts["mean"]) / facts["std"] if len(self.models) > 1 else one.value)
        return float(np.mean(scaled) if self.combine == "mean" else np.min(scaled))

    def _tell(self, completions: Sequence[Completion], shortened: Sequence[bool]) -> None:
        """Counts the answers to prompts of which turns were left out, and warns of the first."""
        self._asked += len(completions)
        if any(shortened) and not self._shortened:
            _LOG.warning(
                "The reward %s left out the oldest turns of a prompt that is too long for its model, first at %s. It "
                "goes on so, and says at the end how many there were.",
                self.name,
                completions[list(shortened).index(True)].prompt.origin,
            )
        self._shortened += sum(shortened)
