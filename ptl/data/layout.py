"""Where a template prints the words of a conversation: the sentinel method, on text alone.

The conversation is printed with every text replaced by a unique sentinel. What stands between the sentinels is the
template's own text. Put together with the real words it must equal, character for character, what the template prints
for the real conversation; then, and only then, every word's place is known. Nothing is searched for, so an answer such
as ``[[1,2],[3,4]]``, or one that repeats the question, cannot be misplaced.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from ptl.data.chat_template import Chat, ChatTemplate, Tools

_SENTINEL = re.compile(r"Wq(\d+)x7Zs")
_THINK = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "thinking")


class Split(NamedTuple):
    """A text cut into words and what is kept around them: outer white space and think tags.

    ``literals[0] + words[0] + literals[1] + ...`` is the text; there is one literal more than words.
    """

    literals: tuple[str, ...]
    words: tuple[str, ...]


def split_text(text: str) -> Split:
    """The words of a message: its text without outer white space, and apart from that of its think block."""
    if text and "</think>" not in text and not text[0].isspace() and not text[-1].isspace():
        return Split(("", ""), (text,))
    think = _THINK.fullmatch(text)
    parts = [think[1], think[2], think[3], think[4]] if think else ["", text]
    literals, words = [parts[0]], []
    for index in range(1, len(parts), 2):
        part = parts[index]
        core = part.strip()
        following = parts[index + 1] if index + 1 < len(parts) else ""
        if not core:
            literals[-1] += part + following
            continue
        start = len(part) - len(part.lstrip())
        literals[-1] += part[:start]
        words.append(core)
        literals.append(part[start + len(core) :] + following)
    return Split(tuple(literals), tuple(words))


class Word(NamedTuple):
    """A word, in the sense of ``Split``, and the index of the message that says it."""

    message: int
    text: str


def form_of(chat: Chat) -> tuple[tuple[Any, ...], list[Word]]:
    """What a chat's print depends on but for its words, as a hashable key, and the words."""
    key: list[Any] = []
    words: list[Word] = []
    for index, message in enumerate(chat):
        for field, value in message.items():
            if field in _TEXT_FIELDS and isinstance(value, str):
                split = split_text(value)
                key += [field, split.literals]
                words += [Word(index, word) for word in split.words]
            else:
                key += [field, value if isinstance(value, str) else repr(value)]
    return tuple(key), words


def masked(chat: Chat) -> Chat:
    """The chat with sentinels for its words, numbered as ``form_of`` lists them. Roles, names and calls stay."""
    count = 0
    out: Chat = []
    for message in chat:
        copy = dict(message)
        for field, value in message.items():
            if field in _TEXT_FIELDS and isinstance(value, str):
                split = split_text(value)
                names = [f"Wq{count + i}x7Zs" for i in range(len(split.words))]
                count += len(names)
                copy[field] = "".join(sum(zip(split.literals, (*names, "")), ()))
        out.append(copy)
    return out


@dataclass(frozen=True)
class Layout:
    """A template's own text around the words of a chat.

    Attributes:
        literals: the template's text before, between and after the words.
        order: for each printed word its index in ``form_of``'s list; a word may be printed twice, or never.
    """

    literals: tuple[str, ...]
    order: tuple[int, ...]

    def place(self, words: Sequence[Word], text: str) -> Placed | None:
        """Where each word stands in the real chat's print; None unless literals and words give exactly ``text``."""
        parts = [self.literals[0]]
        for literal, index in zip(self.literals[1:], self.order):
            parts += [words[index].text, literal]
        if "".join(parts) != text:
            return None
        edges = list(accumulate(map(len, parts)))
        return Placed([words[i].message for i in self.order], edges[0:-1:2], edges[1::2], len(text))


class Placed(NamedTuple):
    """Printed words in order: message index, first character, character after the last; and the text's length."""

    messages: list[int]
    starts: list[int]
    ends: list[int]
    length: int

    def of(self, message: int) -> tuple[int, int, int] | None:
        """(start of the message's first word, end of its last, start of the next message's word); None if no word."""
        own = [k for k, owner in enumerate(self.messages) if owner == message]
        if not own:
            return None
        following = self.starts[own[-1] + 1] if own[-1] + 1 < len(self.starts) else self.length
        return self.starts[own[0]], self.ends[own[-1]], following


def learn_layout(template: ChatTemplate, chat: Chat, tools: Tools = (), *, prompt: bool = False) -> Layout:
    """The layout of a chat's print. Raises RenderError if the template refuses it."""
    parts = _SENTINEL.split(template.print(masked(chat), tools, prompt=prompt))
    return Layout(tuple(parts[0::2]), tuple(map(int, parts[1::2])))


def place(template: ChatTemplate, chat: Chat, tools: Tools, text: str, *, prompt: bool = False) -> Placed | None:
    """Where the words stand in ``text``, the template's print of the chat; None if that cannot be proved."""
    return learn_layout(template, chat, tools, prompt=prompt).place(form_of(chat)[1], text)
