"""The tool loop: write, stop at a call, run the tool, put its result into the context, go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ptl.tools.base import Result
from ptl.tools.calls import answers_of, calls_in, turn_of
from ptl.tools.toolbox import Toolbox
from ptl.types import Message

ROUNDS = 5
"""Times that tools are asked for one answer."""


class Piece(NamedTuple):
    """Some text of the assistant's, as it is written."""

    text: str


class Stopped(NamedTuple):
    """The loop ended without an answer."""

    reason: str


Write = Callable[[Sequence[Message]], Iterable[str]]
"""Pieces of the assistant's next turn; it ends behind a closing tag (``stop_texts``) or with the turn."""


def answer(
    messages: list[Message], write: Write, toolbox: Toolbox, *, rounds: int = ROUNDS
) -> Iterator[Piece | Result | Stopped]:
    """Has the assistant answer, with tools; what happens is given as it happens.

    Args:
        messages: the dialogue, a user's turn last; the assistant's turns and the tools' are appended to it, so that
            it is afterwards what a training row of it would be.
        write: the model.
        toolbox: the tools.
        rounds: turns that may call tools, 1 or more; the turn behind them is the last, and calls in it are not run.
    """
    if rounds < 1:
        raise ValueError(f"the rounds of a tool loop must be 1 or more, got {rounds}")
    begun = sum(message.role == "tool" for message in messages)
    for round_ in range(rounds + 1):
        text = ""
        try:
            for piece in write(messages):
                text += piece
                yield Piece(piece)
        except KeyboardInterrupt:  # what was said until then stays said
            messages.append(turn_of(text, []))
            raise
        calls = calls_in(text, toolbox.tools, begun)
        if not calls or round_ == rounds:
            messages.append(turn_of(text, [call for call in calls if call.by_tag]))
            if calls:
                yield Stopped(f"tools were asked for more than {rounds} times")
            return
        begun += len(calls)
        results = toolbox.run(calls)
        yield from results
        messages += [turn_of(text, calls), *answers_of(results)]
