"""Marks that a person types are text: only the chat template, and the assistant itself, write a mark as its token.

A user who types ``<|im_end|>`` would else end their own turn, and a web page that a tool returns could call a tool. In
what users and tools say, a noncharacter is put into each mark, so that the tokenizer does not find it; the tokenizer's
normaliser then takes the noncharacter out again, and the mark is tokenised like any other text. A message without
marks is not touched.

Marks are the special tokens, and added tokens of the form ``<...>`` or ``[...]``, such as ``<think>``. Other added
tokens, such as runs of spaces, are text that a tokenizer likes to keep whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GUARD = "\ufdd1"
"""Stands inside a typed mark until it is tokenised. A noncharacter: Unicode keeps it out of all text."""
TYPED_BY = ("user", "tool")
"""Roles whose words come from outside."""
_TAG = re.compile(r"[<\[]\S*[>\]]")


def marks(backend: Tokenizer) -> dict[int, str]:
    """Ids and texts of a tokenizer's marks."""
    added = backend.get_added_tokens_decoder()
    return {i: t.content for i, t in added.items() if len(t.content) > 1 and (t.special or _TAG.fullmatch(t.content))}


def mark_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str] | None:
    """Finds the first character of each mark in a text, overlapping ones too; None without marks."""
    texts = sorted(marks(tokenizer.backend_tokenizer).values(), key=len, reverse=True)
    return re.compile(f"(?s)(?=(?:{'|'.join(map(re.escape, texts))}))(.)") if texts else None


def guarded(text: str, pattern: re.Pattern[str] | None) -> str:
    """The text with a ``GUARD`` inside each mark."""
    return text if pattern is None else pattern.sub(rf"\1{GUARD}", text)


def with_guards(chat: Iterable[dict[str, Any]], pattern: re.Pattern[str] | None) -> list[dict[str, Any]]:
    """Messages in which the marks that users and tools typed are guarded."""

    def apart(message: dict[str, Any]) -> dict[str, Any]:
        texts = {key: guarded(message[key], pattern) for key in ("content", "name") if message.get(key)}
        return {**message, **texts} if message["role"] in TYPED_BY else message

    return [apart(message) for message in chat]


class TypedMarks:
    """Encodes texts that hold guarded marks.

    Args:
        backend: recognises marks, and adds nothing to a text.
    """

    def __init__(self, backend: Tokenizer):
        self._plain = backend
        self._marks = marks(backend)
        state: dict[str, Any] = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            # Those matched in the normalised text would be found again once the guard is gone.
            token["normalized"] = token["normalized"] and token["content"] not in self._marks.values()
        drop = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}
        own = [state["normalizer"]] if state["normalizer"] else []
        state["normalizer"] = {"type": "Sequence", "normalizers": [drop, *own]}
        self._backend = Tokenizer.from_str(json.dumps(state))

    def encode(self, text: str) -> Encoding | None:
        """Tokens of the text; guarded marks are text, the others are marks. Offsets count the guards.

        None where the tokenizer makes a mark of a guarded one all the same, because its pieces of text hold its marks.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        expected = self._count(self._plain.encode(text, add_special_tokens=False))
        return encoding if self._count(encoding) == expected else None

    def _count(self, encoding: Encoding) -> int:
        return sum(token in self._marks for token in encoding.ids)
