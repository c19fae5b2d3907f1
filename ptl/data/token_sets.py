"""Which tokens a base model is given, and a tokenizer that has them at their ids.

Ids are written into the tokenizer's own vocabulary. The library numbers added tokens anew whenever it reads a
``tokenizer.json`` whose vocabulary has holes (o200k has), and the rows of a model would then mean other tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

State = Literal["new", "kept", "reserved"]


@dataclass(frozen=True)
class NewToken:
    """A token to add.

    Attributes:
        text: what it is written as.
        special: left out when answers are decoded. Tags that a program finds in a decoded answer are not special.
        about: what it stands for, in words that the base model knows.
        id: where it must be; None takes the next free id.
    """

    text: str
    special: bool = True
    about: str = ""
    id: int | None = None


@dataclass(frozen=True)
class PlacedToken:
    """A token at its id: ``new``; ``kept``, there before; or ``reserved``, which fills a gap."""

    token: NewToken
    id: int
    state: State


def _tags(name: str, opens: str, closes: str) -> tuple[NewToken, ...]:
    return NewToken(f"<{name}>", False, opens), NewToken(f"</{name}>", False, closes)


SETS: Mapping[str, tuple[NewToken, ...]] = {
    "chat": (
        NewToken("<|im_start|>", about="the start of a message, then the name of who speaks"),
        NewToken("<|im_sep|>", about="the end of the name of who speaks, then the text of the message:"),
        NewToken("<|im_end|>", about="the end of a message"),
    ),
    "think": _tags("think", "the start of the reasoning before the answer", "the end of the reasoning"),
    "tools": (
        *_tags("SEARCH-TOOL", "the start of a query to search for", "the end of the search query"),
        *_tags("PYTHON-TOOL", "the start of a Python program to run", "the end of the Python program"),
        *_tags("CALCULATOR-TOOL", "the start of a sum to work out", "the end of the sum"),
        *_tags("CLOCK-TOOL", "the start of a question for the time and the date", "the end of that question"),
    ),
    "results": _tags("TOOL-RESULT", "the start of what the tool found", "the end of what the tool found"),
}
"""Ready sets: marks of turns, of reasoning, of asking for a tool, and what a template may put its results between."""
TEMPLATES: Mapping[str, str] = {"chat": "im_sep"}
"""The packaged chat template that goes with a set."""


def place_tokens(tokenizer: PreTrainedTokenizerFast, wanted: Sequence[NewToken]) -> list[PlacedToken]:
    """Gives each token its id, in ascending order of ids, with reserved tokens in the gaps that given ids leave.

    Tokens without an id come after all others. A token that the tokenizer has keeps its id and its kind.

    Raises:
        ValueError: an id or a token is asked for twice, an id belongs to another token, or a token is at another id.
    """
    vocabulary = tokenizer.get_vocab()
    names = {number: token for token, number in vocabulary.items()}
    end = max(names, default=-1) + 1
    placed: dict[int, PlacedToken] = {}
    for token in wanted:
        if not token.text or token.text != token.text.strip():
            raise ValueError(f"--token {token.text!r}: a token is not empty and has no white space at its ends")
        if sum(token.text == other.text for other in wanted) > 1:
            raise ValueError(f"--token {token.text!r} is given twice: keep one")
        here = vocabulary.get(token.text)
        if here is not None and token.id not in (None, here):
            raise ValueError(
                f"--token {token.text}={token.id}: the tokenizer has this token at id {here}: give that id"
            )
        if here is not None:
            placed[here] = PlacedToken(replace(token, special=_is_special(tokenizer, here, token)), here, "kept")
        elif token.id is not None:
            taken = placed[token.id].token.text if token.id in placed else names.get(token.id)
            if taken is not None:
                raise ValueError(
                    f"--token {token.text}={token.id}: id {token.id} is taken by {taken!r}: give a free id"
                )
            placed[token.id] = PlacedToken(token, token.id, "new")
    following = max(end, *(number + 1 for number in placed)) if placed else end
    free = [token for token in wanted if token.id is None and token.text not in vocabulary]
    placed.update((number, PlacedToken(token, number, "new")) for number, token in enumerate(free, following))
    for number in range(end, max(placed, default=-1)):
        if number not in placed:
            placed[number] = PlacedToken(NewToken(f"<|reserved_{number}|>"), number, "reserved")
    return [placed[number] for number in sorted(placed)]


def _is_special(tokenizer: PreTrainedTokenizerFast, number: int, token: NewToken) -> bool:
    known = tokenizer.added_tokens_decoder.get(number)
    return token.special if known is None else known.special


def with_tokens(tokenizer: PreTrainedTokenizerFast, placed: Sequence[PlacedToken]) -> PreTrainedTokenizerFast:
    """The tokenizer with these tokens at their ids, as a folder of it will load; ``tokenizer`` is not changed.

    Raises:
        ValueError: this kind of tokenizer cannot have them there.
    """
    from ptl.data.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = {entry["content"] for entry in state["added_tokens"]}
        for each in placed:
            if each.token.text not in known:
                flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                entry = {"id": each.id, "content": each.token.text, **flags, "special": each.token.special}
                state["added_tokens"].append(entry)
        state["added_tokens"].sort(key=lambda entry: entry["id"])
        vocabulary = state["model"]["vocab"]
        if isinstance(vocabulary, dict):  # a Unigram vocabulary is a list, whose pieces would match inside a text
            # All of them: what is not in the table, as Qwen's and Llama 3's own marks, is numbered after it.
            for entry in state["added_tokens"]:
                vocabulary.setdefault(entry["content"], entry["id"])
        file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        grown = load_tokenizer(folder)
    grown.name_or_path = tokenizer.name_or_path
    expected = {**tokenizer.get_vocab(), **{each.token.text: each.id for each in placed}}
    found = grown.get_vocab()
    wrong = [token for token, number in expected.items() if found.get(token) != number]
    if wrong:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot have {wrong[0]!r} at id {expected[wrong[0]]} (it would be "
            f"{found.get(wrong[0])}): leave its id out"
        )
    return grown
