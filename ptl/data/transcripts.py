"""Dialogues written as one text, as HH-RLHF has them: ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``."""

from __future__ import annotations

import re

from ptl.data.messages import checked_text
from ptl.data.sources import BadRow
from ptl.types import Message

OPENING = "\n\nHuman:"
"""How a transcript starts where a plain text could stand as well."""
_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def looks_like_transcript(text: str) -> bool:
    """Whether a text starts with a speaker's mark."""
    return _MARK.match(text) is not None


def parse_transcript(text: str, at: str, *, asks: bool = False) -> tuple[Message, ...]:
    """The turns of a transcript, without the white space around each.

    Args:
        text: the transcript.
        at: name of the field, for errors.
        asks: the transcript is a prompt: a last, empty ``Assistant:`` is where the answer goes and no turn.

    Raises:
        BadRow: ``bad_transcript`` where it does not alternate, from a human turn on; ``empty_content`` where a turn is
            blank.
    """
    before, *parts = _MARK.split(checked_text(text, at))
    speakers, said = parts[::2], [content.strip() for content in parts[1::2]]
    if before.strip() or not speakers:
        raise BadRow("bad_transcript", f"{at} does not start with Human: or Assistant:")
    if asks and speakers[-1] == "Assistant" and not said[-1]:
        del speakers[-1], said[-1]
    for i, speaker in enumerate(speakers):
        if speaker != ("Human", "Assistant")[i % 2]:
            raise BadRow("bad_transcript", f"turn {i} of {at} is of {speaker}; expected Human and Assistant in turn")
    if blank := [i for i, content in enumerate(said) if not content]:
        raise BadRow("empty_content", f"turn {blank[0]} of {at} is blank")
    return tuple(Message(role=_ROLES[speaker], content=content) for speaker, content in zip(speakers, said))
