"""What draws answers from the policy while it trains: one small class for every engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import nn

from ptl.models.spec import ModelSpec
from ptl.rollout.sampling import Sampled

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


class Abilities(NamedTuple):
    """What an engine can do.

    Attributes:
        logprobs: it gives the log-probability of each id that it drew, at the temperature of the sampling.
        zero3: it can draw from a policy that ZeRO-3 has cut into shards.
        quantized: it can draw from a policy whose base is kept in codes.
        reproducible: what it draws depends on the weights, the seed and the prompt's number alone, so that a run does
            not change with the number of ranks, and a resumed one goes on as if it had not stopped.
    """

    logprobs: bool
    zero3: bool
    quantized: bool
    reproducible: bool


class Draws(NamedTuple):
    """How answers are drawn. This is all there is: nothing comes from a model's generation configuration.

    Attributes:
        samples: answers to each prompt, K.
        temperature: T of ``softmax(z / T)``, which is drawn from; 0 takes the likeliest id.
        top_p: in (0, 1]; below 1 the log-probabilities are those before the cut, or none where an engine has no others.
        stop: ids that end an answer.
        seed: of the draws; another one for each rollout.
    """

    samples: int
    temperature: float
    top_p: float
    stop: tuple[int, ...]
    seed: int


class Asked(NamedTuple):
    """A prompt to answer.

    Attributes:
        ids: its tokens, at least one.
        number: names it among all prompts of the seed, whatever rank it is on.
        limit: most new ids of an answer, 1 or more.
    """

    ids: Sequence[int]
    number: int
    limit: int


Draw = Callable[[Sequence[Asked], Draws], list[list[Sampled]]]
"""Answers to prompts: K of each, in order. ``Sampled.logprobs`` are at the temperature of the draws."""


class Engine(ABC):
    """Where answers come from.

    Attributes:
        abilities: what it can do.
    """

    abilities: ClassVar[Abilities]

    def check(self, policy: ModelSpec) -> None:
        """Refuses a policy that the engine cannot draw from, before anything is built.

        Raises:
            ValueError: with the key to change.
        """
        if policy.quantize is not None and not self.abilities.quantized:
            raise ValueError(
                f"model.engine {type(self).__name__} cannot draw from a quantised policy: set model.engine to "
                "ptl.rollout.hf.HF, or remove model.policy.quantize"
            )

    @abstractmethod
    def session(self, policy: nn.Module, strategy: Strategy, version: int) -> AbstractContextManager[Draw]:
        """Inside, the engine has the policy's weights of now and draws from them.

        All ranks enter and leave together; inside, each may draw as often as it likes, also never. Modes, hooks and
        random number generators are afterwards as they were, whatever was raised inside.

        Args:
            policy: the model in training, with or without an adapter.
            strategy: the trainer's, which may have cut the policy into shards.
            version: of the weights, the number of optimizer steps that made them.
        """

    def close(self) -> None:  # noqa: B027  (most have nothing to end)
        """Ends what the engine has started; called once when the run ends."""
