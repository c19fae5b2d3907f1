"""What stands between the tokens that a model wrote and those that it writes next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ptl.data.render import Renderer
from ptl.types import Conversation, Message, Origin

_HERE = Origin("the tool loop", 1)


def between(
    renderer: Renderer,
    messages: Sequence[Message],
    turn: Message,
    answers: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    ended: bool,
) -> list[int]:
    """Ids behind a turn that called tools, up to where the next one begins: its end, the results, the next header.

    What the model wrote is not tokenised again. The ids are those of the training row with the same turns, proved
    against the renderer's print of it.

    Args:
        renderer: of the run.
        messages: the dialogue before the turn.
        turn: the assistant's.
        answers: the tools' turns.
        tools: as in ``Conversation``.
        ended: the model has written the turn's end itself.

    Raises:
        ValueError: the template prints the turn otherwise once something follows it, so that the model would not go
            on from what it wrote.
    """
    first = tuple(Message(**{**vars(message), "train": 0.0}) for message in messages)
    asked = Message(**{**vars(turn), "train": 1.0})
    [*_, written] = renderer.render(Conversation(messages=(*first, asked), tools=tuple(tools), origin=_HERE))
    end = int(np.flatnonzero(written.loss_mask)[-1])
    following = renderer.prompt([*messages, turn, *answers], tools)
    if following[: end + 1] != written.ids[: end + 1].tolist():
        raise ValueError(
            "the chat template prints an earlier turn otherwise than the model wrote it (Qwen3 drops the reasoning of "
            "earlier turns), so tools cannot be used in reinforcement learning with it: set data.template to one that "
            "keeps earlier turns (chatml)"
        )
    return following[end + 1 :] if ended else following[end:]
