"""A tokenizer of one's own text: byte-level BPE, which has a token for every byte and so never fails on a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from ptl.data.readers import rows_of
from ptl.data.records import parse_row
from ptl.data.sources import BadRow, Source, detect_format
from ptl.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ptl.data.token_sets import NewToken

END_OF_TEXT = "<|endoftext|>"
"""Ends a document; id 0."""
BYTES = 256
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a text is parted before pairs are merged: words with the space before them, each digit alone (as in Qwen2)."""
_FIRST = 32


def texts_of(path: str, refused: list[str]) -> Iterator[str]:
    """The texts of a file: lines of a ``.txt``; else of each row its ``text``, or what its messages say.

    Args:
        path: as ``Source.path``, or a ``.txt`` file.
        refused: gets where and why for each row that cannot be read.

    Raises:
        ValueError: nothing is there, or it is of no known format.
    """
    if path.endswith(".txt"):
        try:
            with open(path, encoding="utf-8") as file:
                yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from None
        return
    source = Source(path=path)
    rows = rows_of(source)
    first = list(islice(rows, _FIRST))
    row_format = detect_format(source, [row for _, row in first if not isinstance(row, BadRow)])
    for origin, row in chain(first, rows):
        try:
            yield from _said(parse_row(row, row_format, source, origin))
        except BadRow as bad:
            refused.append(f"{origin}: {bad}")


def _said(record: object) -> Iterator[str]:
    if not isinstance(record, Conversation):
        raise BadRow("wrong_type", f"the row is a {type(record).__name__}; expected text or messages")
    if record.text is not None:
        yield record.text
    for message in record.messages:
        yield from filter(None, (message.reasoning, message.content))


def train_tokenizer(
    texts: Iterable[str], size: int, *, tokens: Sequence[NewToken] = (), template: str | None = None
) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE; the same texts in the same order give the same tokenizer.

    Args:
        texts: read once.
        size: tokens of the result: bytes, merges, ``<|endoftext|>`` and ``tokens``. Fewer where the texts have no more
            pairs that occur twice.
        tokens: further tokens; they take the last ids.
        template: Jinja text of a chat template.

    Returns:
        The tokenizer; ``<|endoftext|>`` ends a text and pads.

    Raises:
        ValueError: ``size`` has no room for the bytes and the tokens, or there is no text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ptl.data.token_sets import place_tokens, with_tokens

    extra = [token for token in tokens if token.text != END_OF_TEXT]
    least = BYTES + 1 + len(extra)
    if size < least:
        raise ValueError(f"--size is {size}, below the {least} of all bytes and special tokens: raise it")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(extra),
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    counted = _Counted(texts)
    backend.train_from_iterator(counted, trainer)
    if not counted.letters:
        raise ValueError("the files hold no text")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
    if extra:
        tokenizer = with_tokens(tokenizer, place_tokens(tokenizer, extra))
    tokenizer.chat_template = template
    return tokenizer


class _Counted:
    """Texts on their way, and how many letters they had."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.letters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.letters += len(text)
            yield text
