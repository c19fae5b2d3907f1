"""Whether two tokenizers mean the same by the same ids, and what bytes a token stands for.

A teacher's distribution over ids is worth nothing to a student that reads other strings into those ids, and no loss
shows it. The size of the embedding says little: tables are padded to round numbers (151,936 and 152,064 rows for one
tokenizer), and two tokenizers of one size may differ in their order. So ids are compared by their strings, up to the
last id that a tokenizer knows, and whatever a model computes beyond that is cut off.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN = 3
_ANSWER = "wq1answer"
_PROBE = [{"role": "user", "content": "wq2question"}, {"role": "assistant", "content": _ANSWER}]
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class SharedVocabulary(NamedTuple):
    """What two tokenizers have in common.

    Attributes:
        size: ids 0 to size - 1 are the same strings on both sides; both models' logits are cut to so many columns.
        notes: what a user should know though it stops nothing, one line each; empty where the two are the same.
    """

    size: int
    notes: tuple[str, ...]


def token_table(tokenizer: PreTrainedTokenizerFast) -> list[str | None]:
    """The string of each id, added and special tokens too; None for an id below the last one that names nothing."""
    vocabulary = tokenizer.get_vocab()
    table: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        table[number] = token
    return table


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the last id that names a token: the true vocabulary, whatever the size of the embedding."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the strings in the order of their ids: equal for tokenizers whose ids mean the same."""
    return hashlib.sha256(json.dumps(token_table(tokenizer)).encode()).hexdigest()


def shared_vocabulary(student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of ids that student and teacher share; the size in ``compare_vocabularies``, with the same errors."""
    return compare_vocabularies(student_tokenizer, teacher_tokenizer).size


def compare_vocabularies(
    student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast
) -> SharedVocabulary:
    """The ids that two tokenizers share as a common prefix of their vocabularies.

    One side may have more tokens at its end. The teacher reads what the student's chat template printed, so a teacher
    of another template is only noted, unless its template ends a turn with another token: then the teacher would teach
    the student never to stop.

    Raises:
        ValueError: an id below the shorter vocabulary's end names different strings, or turns end differently.
    """
    student, teacher = token_table(student_tokenizer), token_table(teacher_tokenizer)
    size = min(len(student), len(teacher))
    if student[:size] != teacher[:size]:
        different = [i for i in range(size) if student[i] != teacher[i]]
        examples = "; ".join(
            f"id {i} is {_name(student[i])} for the student and {_name(teacher[i])} for the teacher"
            for i in different[:_SHOWN]
        )
        raise ValueError(
            f"student and teacher do not have the same tokenizer: {examples}; {len(different)} of {size} ids differ. "
            "Choose a teacher of the student's family, or set model.init_args.cross_tokenizer: uld"
        )
    _check_ends(student_tokenizer, teacher_tokenizer)
    notes = []
    for who, table, other in (("student", student, "teacher"), ("teacher", teacher, "student")):
        extra = table[size:]
        if extra:
            shown = ", ".join(_name(token) for token in extra[:_SHOWN]) + (", ..." if len(extra) > _SHOWN else "")
            notes.append(
                f"the {who} has {len(extra)} more tokens than the {other} ({shown}): both are cut to {size} ids"
            )
    ours, theirs = print_chat(student_tokenizer, _PROBE), print_chat(teacher_tokenizer, _PROBE)
    if ours and ours != theirs:
        what = f"prints {theirs!r}" if theirs else "has no chat template"
        notes.append(f"the teacher {what} where the student's template prints {ours!r}: it reads the student's form")
    return SharedVocabulary(size, tuple(notes))


def check_targets(targets: Tensor, shared: int, student_tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses trained tokens that the teacher does not know.

    It reads the values, so call it where the batch still is on the CPU.

    Args:
        targets: int64, any shape; ids that are trained.
        shared: the size that ``shared_vocabulary`` gave.
        student_tokenizer: names the ids in the message.

    Raises:
        ValueError: a target is not below ``shared``.
    """
    outside = targets[targets >= shared]
    if outside.numel():
        ids = outside.unique().tolist()
        names = student_tokenizer.convert_ids_to_tokens(ids[:_SHOWN])
        shown = ", ".join(f"{name!r} (id {i})" for name, i in zip(names, ids))
        raise ValueError(
            f"{outside.numel()} trained tokens are unknown to the teacher, whose vocabulary ends at id {shared - 1}: "
            f"{shown}. Give the teacher these tokens too (ptl tokens add), leave them out of the answers, or set "
            "model.init_args.cross_tokenizer: uld"
        )


def _name(token: str | None) -> str:
    return "nothing" if token is None else repr(token)


# ---- turns ----


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids of the tokens that are marks and not text; SentencePiece's bytes are text, whatever their kind."""
    marked = {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special and not is_byte_piece(str(token))
    }
    return marked | set(tokenizer.all_special_ids)


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The first special token that the chat template prints after an answer; None where it prints none."""
    tail = print_chat(tokenizer, _PROBE).partition(_ANSWER)[2]
    special = special_ids(tokenizer)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return next((i for i in ids if i in special), None)


def print_chat(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    """Messages as the tokenizer's chat template prints them; empty where it has none or cannot print these."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):  # a template is a user's program
        return ""


def _check_ends(student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast) -> None:
    ours, theirs = end_of_turn(student_tokenizer), end_of_turn(teacher_tokenizer)
    if ours is not None and theirs is not None and ours != theirs:
        names = [t.convert_ids_to_tokens(i) for t, i in ((student_tokenizer, ours), (teacher_tokenizer, theirs))]
        raise ValueError(
            f"the student's chat template ends a turn with {names[0]!r} and the teacher's with {names[1]!r}, so the "
            "teacher would teach the student never to stop: set data.init_args.template to the teacher's template"
        )


# ---- bytes ----


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """The bytes of text that each token stands for inside a text.

    The letters of a byte-level vocabulary are bytes. In SentencePiece's, U+2581 is a space and ``<0xE9>`` is a byte. An
    added token stands for its own text; a special token, and an id that names nothing, for None.

    Raises:
        ValueError: the tokenizer's pieces are of neither kind.
    """
    backend = tokenizer.backend_tokenizer
    kinds = _kinds(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else set()
    special = special_ids(tokenizer)
    added = tokenizer.added_tokens_decoder
    texts = {i: token.content.encode() for i, token in added.items() if not is_byte_piece(token.content)}
    table = token_table(tokenizer)
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        plain = [None if token is None else _byte_level(token, alphabet) for token in table]
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        plain = [None if token is None else _sentencepiece(token) for token in table]
    else:
        raise ValueError(
            f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) does not say which bytes a token stands "
            "for: cross-tokenizer distillation needs byte-level BPE or SentencePiece on both sides"
        )
    return [None if i in special else texts.get(i, piece) for i, piece in enumerate(plain)]


def is_byte_piece(token: str) -> bool:
    """A SentencePiece token for one byte, ``<0xE9>``, which stands in where no letter's token exists."""
    return _BYTE_PIECE.fullmatch(token) is not None


def _kinds(state: Any) -> set[str]:
    """Names of a decoder and of its parts."""
    if isinstance(state, dict):
        return {str(state.get("type"))}.union(*(_kinds(part) for part in state.get("decoders") or ()))
    return set()


def _byte_alphabet() -> dict[str, int]:
    """The letter that GPT-2's byte-level BPE writes for each byte, inverted (openai/gpt-2, ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes([alphabet[letter] for letter in token])
    except KeyError:  # a token that was put into the vocabulary as text
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    match = _BYTE_PIECE.fullmatch(token)
    return bytes([int(match.group(1), 16)]) if match else token.replace("\u2581", " ").encode()
