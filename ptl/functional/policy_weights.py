"""What the kinds of policy losses are made of, and how each weighs the tokens of an optimizer window.

A window's loss is the sum of weighted token losses over the sum of the micro-batches' weights. Both follow from the
masks alone, so that the divisor is known before the first forward pass, and the number is the same however the window
was cut into micro-batches and ranks.

A sequence without a trained token, such as a truncated one that is left out, has no weight and counts nowhere; one
whose advantage is 0 counts, since it was looked at and says that nothing should change.

Shape letters: N sampled tokens, S sequences. See ``ptl.functional.sequences`` for ``owners`` and ``mask``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from ptl.functional.sequences import trained_lengths

Kind = Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "rloo"]


class Form(NamedTuple):
    """What makes a kind.

    Attributes:
        ratio: over which tokens ``w`` is taken: a ``token``, the ``mean`` or the ``sum`` of a sequence's log-ratios.
        weighing: how a token is weighed: ``token``, ``sequence``, ``group`` or ``constant``.
        surrogate: ``clipped`` or ``cispo``.
        clip_low, clip_high: e_low and e_high where nobody sets them.
    """

    ratio: Literal["token", "mean", "sum"]
    weighing: Literal["token", "sequence", "group", "constant"]
    surrogate: Literal["clipped", "cispo"]
    clip_low: float
    clip_high: float


FORMS: Mapping[str, Form] = {
    "grpo": Form("token", "sequence", "clipped", 0.2, 0.2),
    "dr_grpo": Form("token", "constant", "clipped", 0.2, 0.2),
    "dapo": Form("token", "token", "clipped", 0.2, 0.28),
    "bnpo": Form("token", "group", "clipped", 0.2, 0.2),
    "gspo": Form("mean", "sequence", "clipped", 3e-4, 4e-4),
    # No floor, and a cap of 5 on the weight: the paper tunes the cap alone.
    "cispo": Form("token", "token", "cispo", 1.0, 4.0),
    "rloo": Form("sum", "sequence", "clipped", 0.2, 0.2),
}


class Weights(NamedTuple):
    """How the tokens of a micro-batch are weighed.

    Attributes:
        tokens: float64 [N], the factor of each token's loss; 0 where it is not trained.
        total: float64 [], this micro-batch's part of what the window's sum of losses is divided by.
    """

    tokens: Tensor
    total: Tensor


def weights_of(
    kind: Kind,
    mask: Tensor,
    owners: Tensor,
    sequences: int,
    *,
    constant: int | None = None,
    group_tokens: Tensor | None = None,
) -> Weights:
    """The weights of a micro-batch; those of a window's micro-batches add up, however it was cut into sequences.

    Args:
        kind: of the loss.
        mask: bool [N].
        owners: int64 [N].
        sequences: S.
        constant: ``dr_grpo``'s length, above 0: the most tokens that an answer may have.
        group_tokens: [S], for ``bnpo``: trained tokens of all answers to the sequence's prompt in the window, also of
            those that lie in other micro-batches (``tokens_of_groups``).

    Raises:
        ValueError: what the kind needs is missing.
    """
    weighing = FORMS[kind].weighing
    on = mask.double()
    lengths = trained_lengths(mask, owners, sequences)
    present = (lengths > 0).sum().double()
    if weighing == "token":
        return Weights(on, on.sum())
    if weighing == "sequence":
        return Weights(on / lengths.clamp_min(1)[owners], present)
    if weighing == "constant":
        if constant is None or constant < 1:
            raise ValueError(f"{kind} divides by a constant length: set the most tokens of an answer, got {constant}")
        return Weights(on / constant, present)
    if group_tokens is None:
        raise ValueError(f"{kind} divides by the tokens of a prompt's answers: group_tokens is missing")
    shares = on / group_tokens.clamp_min(1)[owners]
    return Weights(shares, shares.sum())


def tokens_of_groups(mask: Tensor, owners: Tensor, groups: Tensor) -> Tensor:
    """Trained tokens of all answers to each sequence's prompt, int64 [S]; over whole groups, before they are split.

    Args:
        mask: bool [N].
        owners: int64 [N].
        groups: int64 [S], the prompt of each sequence.
    """
    lengths = trained_lengths(mask, owners, len(groups))
    _, index = groups.unique(return_inverse=True)
    return lengths.new_zeros(len(groups)).index_add(0, index, lengths)[index]
