"""A tokenizer seen from its bytes: what its ids stand for, and ids and byte ends of a text that it is given."""

from __future__ import annotations

import copy
import json
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from ptl.models.vocabulary import special_ids, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Place = Literal["start", "mark", "inside"]
"""Where a text stands: first in a document, after a special token, or after other text."""
_PROBE = "Hello world, 12 is\n more."


class Encoded(NamedTuple):
    """Ids of a text, and the byte of the text at which each token ends."""

    ids: np.ndarray
    ends: np.ndarray


class Pieces:
    """What each id of a tokenizer stands for in bytes, and the tokenizer itself, free of what it would add to a text.

    SentencePiece tokenizers put a space before a text, some also after each special token. That space is in their
    tokens and not in the text.

    Args:
        tokenizer: byte-level BPE or SentencePiece.

    Raises:
        ValueError: the bytes of its tokens are not those of a text that it encodes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.bytes = token_bytes(tokenizer)
        self.special = special_ids(tokenizer)
        unknown = tokenizer.unk_token_id
        self.unknown = unknown if isinstance(unknown, int) else None
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.post_processor = None  # type: ignore[assignment]
        backend.no_padding()
        backend.no_truncation()
        self._marks = copy.deepcopy(backend)
        alone, marked = self.marks(_PROBE), self.marks(self._any_mark() + _PROBE)
        while marked and marked[0] in self.special:
            marked.pop(0)
        self._spaced_at: dict[Place, bool] = {
            "start": self._spaced(alone),
            "mark": self._spaced(marked),
            "inside": False,
        }
        # What looks like a special token inside a text is text: only ids of the student's marks become marks.
        backend.encode_special_tokens = True
        self._backend = backend
        self._plain = _without_prefix(backend) if any(self._spaced_at.values()) else backend

    def _any_mark(self) -> str:
        """The text of a special token."""
        added = self._marks.get_added_tokens_decoder()
        return next((added[i].content for i in sorted(self.special) if i in added), "")

    def _spaced(self, ids: list[int]) -> bool:
        """Whether the probe's ids begin with a space that it does not have."""
        found = self.join(ids)
        if found.lstrip(b" ") != _PROBE.encode() or len(found) > len(_PROBE) + 1:
            raise ValueError(
                f"the tokenizer writes {_PROBE!r} with tokens of the bytes {found!r}, so its tokens cannot be aligned "
                "with another's: cross-tokenizer distillation needs byte-level BPE or SentencePiece on both sides"
            )
        return found != _PROBE.encode()

    def place_after(self, ids: list[int]) -> Place:
        """Where a text stands that follows these ids."""
        return "start" if not ids else "mark" if ids[-1] in self.special else "inside"

    def join(self, ids: list[int]) -> bytes:
        """The bytes of text tokens; special tokens have none."""
        return b"".join(self.bytes[i] or b"" for i in ids)

    def ends(self, ids: list[int], place: Place) -> tuple[bytes, np.ndarray]:
        """The text that text tokens at a place stand for, and where in it each ends."""
        lengths = [len(self.bytes[i] or b"") for i in ids]
        raw = self.join(ids)
        if self._spaced_at[place] and raw.startswith(b" "):
            raw = raw[1:]
            first = next(i for i, length in enumerate(lengths) if length)
            lengths[first] -= 1
        return raw, np.fromiter(accumulate(lengths), np.int64, len(lengths))

    def marks(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are recognised: a piece of a chat template."""
        return self._marks.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, place: Place) -> Encoded:
        """Ids of a text at a place; nothing in it is read as a special token.

        Where a normaliser has changed the text, the tokenizer's own character offsets say where tokens end.
        """
        spaced = self._spaced_at[place]
        encoding = (self._backend if spaced else self._plain).encode(text, add_special_tokens=False)
        ids, expected = encoding.ids, text.encode()
        found, ends = self.join(ids), np.cumsum([len(self.bytes[i] or b"") for i in ids], dtype=np.int64)
        if spaced and found == b" " + expected:
            return Encoded(np.array(ids, np.int32), np.maximum(ends - 1, 0))
        if found == expected:
            return Encoded(np.array(ids, np.int32), ends)
        return Encoded(np.array(ids, np.int32), _ends_by_offsets(encoding, text))


def _ends_by_offsets(encoding: Encoding, text: str) -> np.ndarray:
    """Byte ends by character offsets. Tokens that share a character end where it begins, but for the last of them."""
    at = [0, *accumulate(len(letter.encode()) for letter in text)]
    spans = encoding.offsets
    ends = [at[a if b == following else b] for (a, b), (_, following) in pairwise([*spans, (0, -1)])]
    return np.maximum.accumulate(np.array(ends, np.int64)) if ends else np.zeros(0, np.int64)


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """The tokenizer without the space that it puts before a text."""

    def strip(part: dict | None) -> dict | None:
        if part is None or part.get("type") == "Prepend":
            return None
        for key in ("normalizers", "pretokenizers"):
            if key in part:
                part[key] = [kept for inner in part[key] if (kept := strip(inner)) is not None]
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
        return part

    state = json.loads(backend.to_str())
    state["normalizer"], state["pre_tokenizer"] = strip(state["normalizer"]), strip(state["pre_tokenizer"])
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    return plain
