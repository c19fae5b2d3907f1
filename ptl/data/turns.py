"""What two chat templates print between the turns, and which special tokens have the same role in both."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from ptl.data.pieces import Pieces
from ptl.models.vocabulary import end_of_turn, print_chat, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SYSTEM, _USER, _ANSWER, _NEXT = "wq1system", "wq2question", "wq3answer", "wq4question"


class Header(NamedTuple):
    """What the student's template prints before a turn, and what the teacher's does.

    Attributes:
        student: its ids, at least one.
        teacher: the ids that take their place.
        first: it stands at the beginning of a document alone.
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    first: bool


def special_pairs(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> dict[int, int]:
    """The teacher's special token for each of the student's that has one.

    The token that ends a turn in one chat template is the one that ends it in the other. All others go by their
    string, and an end of text without a namesake is the other's end of text. The end of a turn comes first.
    """
    names = {str(teacher.added_tokens_decoder[i]): i for i in special_ids(teacher) if i in teacher.added_tokens_decoder}
    pairs = {
        i: names[name]
        for i in sorted(special_ids(student))
        if (name := str(student.added_tokens_decoder.get(i, ""))) in names
    }
    ours, theirs = student.eos_token_id, teacher.eos_token_id
    if isinstance(ours, int) and isinstance(theirs, int):
        pairs.setdefault(ours, theirs)
    end, their_end = end_of_turn(student), end_of_turn(teacher)
    target = theirs if their_end is None else their_end
    if end is not None and isinstance(target, int):
        pairs = {end: target, **{i: other for i, other in pairs.items() if i != end}}
    return pairs


def headers(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, student_pieces: Pieces, teacher_pieces: Pieces
) -> list[Header]:
    """The headers that both chat templates print, the longest first; none where the templates print the same."""
    ours, theirs = _turns(student), _turns(teacher)
    if ours == theirs:
        return []
    found = [
        Header(tuple(student_pieces.marks(ours[name])), tuple(teacher_pieces.marks(theirs[name])), "start" in name)
        for name in ours
        if ours[name] and name in theirs
    ]
    return sorted(found, key=lambda header: -len(header.student))


def _turns(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """What the chat template prints between contents; what follows an answer counts from after the end of its turn."""
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    answer, following = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}
    out: dict[str, str] = {}
    parts = _between(print_chat(tokenizer, [user, answer, following]), _USER, _ANSWER, _NEXT)
    if parts:
        out["start"], out["to assistant"], to_user = parts[:3]
        number = end_of_turn(tokenizer)
        end = "" if number is None else str(tokenizer.added_tokens_decoder[number])
        out["to user"] = to_user.partition(end)[2] if end and end in to_user else to_user
    parts = _between(print_chat(tokenizer, [system, user]), _SYSTEM, _USER)
    if parts:
        out["start system"], out["system to user"] = parts[:2]
    return out


def _between(text: str, *marks: str) -> list[str]:
    """The parts of a text around marks that are there once each and in order, else nothing."""
    parts = re.split("|".join(marks), text)
    return parts if re.findall("|".join(marks), text) == list(marks) else []
