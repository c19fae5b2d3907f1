"""From trained characters to trained tokens: each document is tokenised once, as a whole.

Where a token lies in the text is known in one of two ways. The tokens of byte-level tokenizers (GPT-2's, Llama 3's,
Qwen's) stand for a fixed number of bytes each, so a running sum over the ids gives all positions, and its total, equal
to the length of the text, is the check. For others the tokenizer's own character offsets are used, which cost a third
more time.
"""

from __future__ import annotations

import copy
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer, decoders, normalizers

from ptl.data.chat_template import RenderError
from ptl.data.documents import Document
from ptl.data.typed_marks import GUARD, TypedMarks
from ptl.types import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class _Straddle(NamedTuple):
    """A boundary, in characters, that lies inside a token."""

    at: int


class Encoder:
    """The tokenizer's own backend, on a copy of which nobody's padding or truncation settings act.

    The copy has no post-processor: that would add BOS, which chat templates print themselves, and in byte-level
    tokenizers it trims white space off the offsets, which hides tokens that straddle a boundary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, terminators: Sequence[int]):
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.post_processor = None  # type: ignore[assignment]
        self._backend.no_padding()
        self._backend.no_truncation()
        self._typed_marks = TypedMarks(self._backend)
        self._terminators = frozenset(terminators)
        self._byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        self._byte_lengths = _byte_lengths(self._backend) if self._byte_level else np.zeros(0, np.int32)

    def description(self) -> str:
        """The backend as JSON: what a fingerprint of the tokenizer covers."""
        return self._backend.to_str()

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, nothing added. Raises RenderError for a typed mark that cannot be written as text."""
        return self._encoding(text).ids

    def _encoding(self, text: str) -> Encoding:
        if GUARD not in text:
            return self._backend.encode(text, add_special_tokens=False)
        encoding = self._typed_marks.encode(text)
        if encoding is None:
            raise RenderError(
                "typed_mark",
                "a message of a user or tool holds the text of a special token, which this tokenizer cannot write as "
                "text; take it out of the message",
            )
        return encoding

    def encode(self, documents: Sequence[Document]) -> list[Tokens | RenderError]:
        """Tokens of each document, by one call of the tokenizer.

        A token that holds the last characters of a header and the first of an answer cannot come up at inference,
        where the prompt is tokenised by itself. Such a document is tokenised in pieces that meet at that boundary; if
        the tokenizer does not give the same text for the pieces, the document is refused.
        """
        texts = [document.text for document in documents]
        batch = self._backend.encode_batch_fast if self._byte_level else self._backend.encode_batch
        encodings = batch(texts, add_special_tokens=False)
        return [self._tokens(document, encoding) for document, encoding in zip(documents, encodings)]

    def _tokens(self, document: Document, encoding: Encoding) -> Tokens | RenderError:
        if GUARD in document.text:
            try:
                return self._by_offsets(document, self._encoding(document.text))
            except RenderError as error:
                return error
        return (self._by_bytes if self._byte_level else self._by_offsets)(document, encoding)

    def _by_bytes(self, document: Document, encoding: Encoding) -> Tokens | RenderError:
        """Trained tokens by the number of bytes of each; by offsets where their sum is not the text."""
        text, ids = document.text, np.array(encoding.ids, dtype=np.int32)
        ends = self._byte_lengths[ids].cumsum()
        total = len(text) if text.isascii() else len(text.encode())
        if (ends[-1] if len(ends) else 0) != total or not self._is_kept(text):
            return self._by_offsets(document, self._backend.encode(text, add_special_tokens=False))
        mask = np.zeros(len(ids), dtype=np.float32)
        if document.spans:
            edges = [edge for start, end, _ in document.spans for edge in (start, end)]
            if len(text) != total:
                edges = [len(text[:edge].encode()) for edge in edges]
            tokens = np.searchsorted(ends, edges) + 1
            tokens[[edge == 0 for edge in edges]] = 0
            if (ends[tokens - 1] != edges)[tokens > 0].any():
                return self._by_offsets(document, self._backend.encode(text, add_special_tokens=False))
            for (_, _, weight), first, end in zip(document.spans, tokens[0::2], tokens[1::2]):
                mask[first:end] = weight
        return finished(ids, mask)

    def _is_kept(self, text: str) -> bool:
        """The tokenizer's normaliser leaves the text as it is."""
        normalizer = self._backend.normalizer
        if normalizer is None:
            return True
        return isinstance(normalizer, normalizers.NFC) and unicodedata.is_normalized("NFC", text)

    def _by_offsets(self, document: Document, encoding: Encoding) -> Tokens | RenderError:
        ids = np.array(encoding.ids, dtype=np.int32)
        mask = np.zeros(len(ids), dtype=np.float32)
        for start, end, weight in document.spans:
            found = self._token_span(document.text, encoding, start, end)
            if isinstance(found, _Straddle):
                try:
                    return self._in_pieces(document, encoding)
                except RenderError as error:
                    return error
            mask[found[0] : found[1]] = weight
        return finished(ids, mask)

    def _token_span(self, text: str, encoding: Encoding, start: int, end: int) -> tuple[int, int] | _Straddle:
        """First token and token after the last of the characters ``start`` to ``end``."""
        first, begin = None, start
        while first is None and begin < end:  # a normaliser may have removed characters
            first, begin = encoding.char_to_token(begin), begin + 1
        last, stop = None, end
        while last is None and stop > start:
            last, stop = encoding.char_to_token(stop - 1), stop - 1
        if first is None or last is None:
            return 0, 0
        if _chars(encoding, first)[0] < start:
            return _Straddle(start)
        count = len(encoding.ids)
        while last + 1 < count and _chars(encoding, last + 1)[0] < end:  # the bytes of one character
            last += 1
        # An end token may swallow the white space after it; it is the end token all the same.
        excess = text[end : _chars(encoding, last)[1]]
        if excess and not (excess.isspace() and encoding.ids[last] in self._terminators):
            return _Straddle(end)
        return first, last + 1

    def _in_pieces(self, document: Document, whole: Encoding) -> Tokens:
        """The document tokenised in pieces that meet at each boundary which lies inside a token."""
        cuts: list[int] = []
        for _ in range(2 * len(document.spans) + 1):
            edges = [0, *cuts, len(document.text)]
            pieces = [self._encoding(document.text[a:b]) for a, b in pairwise(edges)]
            mask, straddle = self._piecewise_mask(document, edges, pieces)
            if straddle is None:
                break
            if straddle in cuts:
                raise _refusal(document, straddle)
            cuts = sorted([*cuts, straddle])
        else:
            raise _refusal(document, cuts[0])
        ids = [token for piece in pieces for token in piece.ids]
        if not self._byte_level:
            text = self._backend.decode(ids, skip_special_tokens=False)
            if text not in (document.text, self._backend.decode(whole.ids, skip_special_tokens=False)):
                raise _refusal(document, cuts[0])
        return finished(np.array(ids, dtype=np.int32), mask)

    def _piecewise_mask(
        self, document: Document, edges: list[int], pieces: list[Encoding]
    ) -> tuple[np.ndarray, int | None]:
        """Loss mask over all pieces, or the next boundary that lies inside a token."""
        mask = np.zeros(sum(len(piece.ids) for piece in pieces), dtype=np.float32)
        offset = 0
        for (begin, stop), piece in zip(pairwise(edges), pieces):
            for start, end, weight in document.spans:
                low, high = max(start, begin), min(end, stop)
                if low >= high:
                    continue
                found = self._token_span(document.text[begin:stop], piece, low - begin, high - begin)
                if isinstance(found, _Straddle):
                    return mask, found.at + begin
                mask[offset + found[0] : offset + found[1]] = weight
            offset += len(piece.ids)
        return mask, None


def _byte_lengths(backend: Tokenizer) -> np.ndarray:
    """Bytes of text that each token of a byte-level tokenizer stands for: its alphabet has one letter a byte."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)
    for number, token in backend.get_added_tokens_decoder().items():
        lengths[number] = len(token.content.encode())
    return lengths


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    """First character of a token and the one after its last."""
    chars = encoding.token_to_chars(token)
    assert chars is not None  # without a post-processor every token comes from the text
    return chars


def finished(ids: np.ndarray, mask: np.ndarray) -> Tokens:
    """Tokens whose first is no target: nothing precedes it."""
    mask[:1] = 0.0
    return Tokens(ids=ids, loss_mask=mask)


def _refusal(document: Document, at: int) -> RenderError:
    return RenderError(
        "straddling_token",
        f"one token holds characters on both sides of {document.text[max(at - 20, 0) : at]!r} | "
        f"{document.text[at : at + 20]!r}, and this tokenizer cannot be split there; strip the white space around "
        "the message",
    )
