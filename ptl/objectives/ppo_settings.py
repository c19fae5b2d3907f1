"""What PPO refuses before anything is built, and the settings that follow from others."""

from __future__ import annotations

import math
from dataclasses import replace

from ptl.functional.kl import AdaptiveKL, FixedKL
from ptl.functional.moments import RewardNormaliser
from ptl.functional.policy_loss import PolicyLoss
from ptl.models.optimizer import Optimizer
from ptl.rollout.settings import Rollout


def check_numbers(
    *,
    discount: float,
    decay: float,
    value_clip: float | None,
    value_factor: float,
    missing_end_penalty: float,
    warm_up: int,
) -> None:
    """Raises ``ValueError`` for a number out of its range, with its key."""
    for name, share in (("discount", discount), ("decay", decay)):
        if not 0 <= share <= 1:
            raise ValueError(f"model.{name} must be in [0, 1], got {share}")
    if value_clip is not None and not value_clip > 0:
        raise ValueError(f"model.value_clip must be above 0, or null for no clip, got {value_clip}")
    if not 0 < value_factor < math.inf:
        raise ValueError(f"model.value_factor must be above 0, got {value_factor}: the critic would not learn")
    if not 0 <= missing_end_penalty < math.inf:
        raise ValueError(
            f"model.missing_end_penalty is taken from a score: it must be 0 or more, got {missing_end_penalty}"
        )
    if warm_up < 0:
        raise ValueError(f"model.warm_up must be 0 or more optimizer steps, got {warm_up}")


def check_settings(
    rollout: Rollout,
    loss: PolicyLoss,
    kl: FixedKL | AdaptiveKL | None,
    missing_end_penalty: float,
    warm_up: int,
    optimizer: Optimizer,
) -> None:
    """Raises ``ValueError`` for settings that exclude each other, with the keys to change."""
    if loss.kind != "dapo":
        raise ValueError(
            f"model.loss.kind is {loss.kind}; PPO clips token by token and weighs all tokens alike, which is dapo: "
            "leave it out, or take ptl.objectives.grpo.GRPO for another kind"
        )
    if loss.kl and kl is not None:
        raise ValueError(
            f"model.loss.kl is {loss.kl} and model.kl is set: the divergence would count twice. Keep model.kl, which "
            "takes it from the reward, or model.loss.kl, which adds it to the loss"
        )
    if rollout.refill:
        raise ValueError(
            f"model.rollout.refill is {rollout.refill}: it replaces prompts whose answers all have one reward, from "
            "which PPO learns too, since it compares an answer with the critic and not with other answers. Set it to 0"
        )
    if rollout.mask_truncated and missing_end_penalty:
        raise ValueError(
            f"model.missing_end_penalty is {missing_end_penalty}, and model.rollout.mask_truncated leaves out the "
            "answers that it is for: set one of the two"
        )
    if warm_up and optimizer.weight_decay:
        raise ValueError(
            f"model.warm_up is {warm_up} and model.optimizer.weight_decay {optimizer.weight_decay}: decay would move "
            "the policy while only the critic should learn. Set one of the two to 0"
        )


def clipped_alike(loss: PolicyLoss) -> PolicyLoss:
    """The loss with PPO's clip of 0.2 on both sides, where none was set; ``dapo`` has a higher one above."""
    high = loss.form.clip_low if loss.clip_high is None else loss.clip_high
    return replace(loss, clip_low=loss.form.clip_low, clip_high=high)


def normaliser_of(normalise: bool | float) -> RewardNormaliser | None:
    """The normaliser of rewards, with a clip where a number was given.

    Raises:
        ValueError: the number is not above 0.
    """
    if normalise is False:
        return None
    if normalise is True:
        return RewardNormaliser()
    if not 0 < normalise < math.inf:
        raise ValueError(f"model.normalise_rewards must be true, false, or a clip above 0, got {normalise}")
    return RewardNormaliser(clip=float(normalise))
