"""What to do with a conversation that is longer than the model's window."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from ptl.data.chat_template import RenderError, TooLong
from ptl.types import Conversation, Message, Tokens

Truncation = Literal["drop", "error", "keep_start", "drop_oldest_turns", "split"]


def keep_start(documents: list[Tokens], max_length: int) -> list[Tokens]:
    """The first ``max_length`` tokens of each document.

    The end token of an answer that is cut is cut with it, and no other is put in its place: the model is not taught to
    stop early. Documents without a trained token are left out, and the last one kept then counts as truncated.

    Raises:
        TooLong: no document has a trained token left.
    """
    kept: list[Tokens] = []
    for tokens in documents:
        if len(tokens.ids) <= max_length:
            kept.append(tokens)
            continue
        mask = tokens.loss_mask[:max_length]
        if mask.any():
            lost_end = bool(mask[-1] > 0 and tokens.loss_mask[max_length] > 0)
            kept.append(Tokens(tokens.ids[:max_length], mask, truncated=True, lost_end=lost_end))
    if not kept:
        raise _nothing_left(max_length)
    if len(kept) < len(documents):
        kept[-1] = dataclasses.replace(kept[-1], truncated=True)
    return kept


def split(tokens: Tokens, max_length: int) -> list[Tokens]:
    """A document in windows of at most ``max_length`` tokens, 2 or more.

    A window begins with the last token of the one before it, so that every token but the document's first is predicted
    once, and none is lost.
    """
    starts = range(0, max(len(tokens.ids) - 1, 1), max_length - 1)
    windows = [(tokens.ids[at : at + max_length], tokens.loss_mask[at : at + max_length].copy()) for at in starts]
    for _, mask in windows:
        mask[:1] = 0.0
    return [Tokens(ids, mask) for ids, mask in windows]


def without_oldest(
    conversation: Conversation, render: Callable[[Conversation], list[Tokens]], max_length: int, longest: int
) -> list[Tokens]:
    """The conversation with as few of its oldest exchanges dropped as let all its documents fit.

    Raises:
        TooLong: its last exchange alone is longer than ``max_length``, or nothing trained is left.
        RenderError: as ``render``.
    """
    head, starts = exchanges(conversation.messages)

    def rendered(dropped: int) -> list[Tokens]:
        messages = conversation.messages[:head] + conversation.messages[starts[dropped] :]
        try:
            return render(dataclasses.replace(conversation, messages=messages))
        except RenderError as error:
            if error.reason == "nothing_trained":
                return []
            raise

    def fits(documents: list[Tokens]) -> bool:
        return all(len(tokens.ids) <= max_length for tokens in documents)

    low, high = 1, len(starts)  # fewer messages are fewer tokens, so the smallest number is found by bisection
    best: list[Tokens] | None = None
    while low < high:
        middle = (low + high) // 2
        documents = rendered(middle)
        if fits(documents):
            best, high = documents, middle
        else:
            low = middle + 1
    if best is None:
        raise TooLong(
            "too_long",
            f"{longest} tokens, and still more than max_length {max_length} when only the last exchange is kept; raise "
            "max_length, or set truncation to drop or keep_start",
        )
    if not best:
        raise _nothing_left(max_length)
    return [dataclasses.replace(tokens, truncated=True) for tokens in best]


def exchanges(messages: tuple[Message, ...]) -> tuple[int, list[int]]:
    """How many system and developer messages lead, and where each exchange starts.

    An exchange is a user's turn, or several in a row, with all that follows up to the next user's turn; what an
    assistant says before the first user is an exchange too. A tool call and its result are never parted.
    """
    head = int(np.argmin([message.role in ("system", "developer") for message in messages] + [False]))
    starts = [
        index
        for index in range(head, len(messages))
        if index == head or (messages[index].role == "user" and messages[index - 1].role != "user")
    ]
    return head, starts


def _nothing_left(max_length: int) -> TooLong:
    return TooLong("nothing_left", f"no trained token left after truncation to {max_length}")
