"""One document for two tokenizers: the teacher's ids of a student's document, and which tokens of both belong together.

Nothing of the student is tokenised again: its ids are what the renderer made. The text between two special tokens is
the bytes of the student's tokens, and the teacher's tokenizer reads that text. Student and teacher tokens that end at
the same byte close a group. (TRL 1.16's GOLD aligns the same way, on a text that it renders a second time, for
byte-level tokenizers only, and gives its zero-width EOS no partner.)

Special tokens have no bytes. Each becomes the teacher's token of the same role (the end of a turn, the end of a text)
or else of the same string, never the tokens of its spelling. Where the two chat templates differ, the headers between
turns that both print are exchanged as a whole, so that the teacher reads a conversation in its own form.

**What cannot be aligned** has weight 0 and is counted: trained special tokens for which the teacher has none; trained
tokens of a header that was exchanged; bytes that are no UTF-8, such as half a character at a cut; tokens without bytes
at the end of a text; text that the teacher can only write as its unknown token; a group that holds the first token of
a document, which nothing predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptl.data.pieces import Pieces, Place
from ptl.data.turns import Header, headers, special_pairs
from ptl.models.vocabulary import is_byte_piece, token_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Realigned(NamedTuple):
    """A student's document as its teacher reads it.

    Attributes:
        teacher_ids: int32 [M].
        groups: int64 [G, 4], in the order of the text: a group's first student token and the one after its last, then
            the same of the teacher's. Both sides' tokens stand for the same bytes, or for the same mark.
        weights: float32 [G], the sum of the loss weights of a group's student tokens, so that a loss divided by the
            weight of the student's tokens stays a mean over these.
        unaligned: trained student tokens that are in no group.
        unaligned_weight: the sum of their loss weights.
    """

    teacher_ids: np.ndarray
    groups: np.ndarray
    weights: np.ndarray
    unaligned: int
    unaligned_weight: float


class GroupRows(NamedTuple):
    """The groups of several documents as rows of hidden states.

    Attributes:
        student_positions: int64 [N], flat positions of the hidden states that predict the groups' student tokens.
        teacher_positions: int64 [M], the same of the teacher.
        groups: int64 [G, 4], as in ``Realigned``, but of rows of these two.
        weights: float32 [G].
    """

    student_positions: np.ndarray
    teacher_positions: np.ndarray
    groups: np.ndarray
    weights: np.ndarray


def realign(
    ids: np.ndarray,
    loss_mask: np.ndarray,
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
) -> Realigned:
    """One document through ``Realigner``, which is to be kept where there are many."""
    return Realigner(student_tokenizer, teacher_tokenizer)(ids, loss_mask)


class Realigner:
    """Aligns documents of a student's tokenizer with a teacher's.

    Attributes:
        matched: int64 [K] student ids and int64 [K] teacher ids that stand for the same bytes or the same mark, one to
            one.

    Args:
        student_tokenizer: byte-level BPE or SentencePiece.
        teacher_tokenizer: likewise.

    Raises:
        ValueError: it is not known which bytes a tokenizer's tokens stand for.
    """

    def __init__(self, student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast):
        self._student, self._teacher = Pieces(student_tokenizer), Pieces(teacher_tokenizer)
        self._marks = special_pairs(student_tokenizer, teacher_tokenizer)
        self._headers: dict[int, list[Header]] = {}  # by their first token
        for header in headers(student_tokenizer, teacher_tokenizer, self._student, self._teacher):
            self._headers.setdefault(header.student[0], []).append(header)
        first = teacher_tokenizer("a")["input_ids"][:1]
        bos = teacher_tokenizer.bos_token_id
        self._lead = [bos] if isinstance(bos, int) and first == [bos] else []
        ours, theirs = _by_bytes(student_tokenizer, self._student), _by_bytes(teacher_tokenizer, self._teacher)
        # Roles may send two of the student's marks to one of the teacher's: then the first of them is matched.
        marks = {theirs: ours for ours, theirs in reversed(self._marks.items())}
        pairs = [(ours[piece], theirs[piece]) for piece in ours.keys() & theirs.keys()]
        pairs += [(mark, their_mark) for their_mark, mark in marks.items()]
        table = np.array(sorted(pairs), np.int64).reshape(-1, 2)
        self.matched = (table[:, 0].copy(), table[:, 1].copy())

    def __call__(self, ids: np.ndarray, loss_mask: np.ndarray) -> Realigned:
        """The teacher's ids of a document and its groups.

        Args:
            ids: int [T], the student's.
            loss_mask: float [T], weight of each id as a target.
        """
        walk = _Walk(list(self._lead))
        trained = np.asarray(loss_mask) != 0
        trained[:1] = False
        tokens, at = np.asarray(ids).tolist(), 0
        place: Place = "start"
        while at < len(tokens):
            header = self._header(tokens, trained, at)
            if header is not None:
                if at == 0 and walk.ids == list(header.teacher[:1]):  # the header brings its own
                    walk.ids.clear()
                walk.ids.extend(header.teacher)
                at += len(header.student)
                place = self._student.place_after(tokens[:at])
                walk.place = self._teacher.place_after(walk.ids)
            elif tokens[at] in self._student.special:
                self._mark(walk, tokens[at], at)
                at, place = at + 1, "mark"
            else:
                end = self._text_end(tokens, trained, at)
                self._text(walk, tokens[at:end], at, place)
                at, place = end, "inside"
        return walk.finish(np.asarray(loss_mask, np.float32) * trained)

    def _header(self, tokens: list[int], trained: np.ndarray, at: int) -> Header | None:
        for header in self._headers.get(tokens[at], ()):
            end = at + len(header.student)
            if (at == 0 or not header.first) and tuple(tokens[at:end]) == header.student and not trained[at:end].any():
                return header
        return None

    def _mark(self, walk: _Walk, token: int, at: int) -> None:
        partner = self._marks.get(token)
        if partner is None:
            return
        if at == 0 and walk.ids == [
            partner
        ]:  # the teacher's tokenizer begins a text with it, and so does the student's
            return
        walk.groups.append((at, at + 1, len(walk.ids), len(walk.ids) + 1))
        walk.ids.append(partner)
        walk.place = "mark"

    def _text_end(self, tokens: list[int], trained: np.ndarray, at: int) -> int:
        """Where the text at ``at`` ends: at a special token, a header, or where training begins or stops.

        The last, so that no token of the teacher holds characters of a prompt and of an answer. The first token of a
        document is never trained, which is no such border.
        """
        kind, end = trained[at if at else min(1, len(tokens) - 1)], at + 1
        while end < len(tokens) and tokens[end] not in self._student.special and trained[end] == kind:
            if self._header(tokens, trained, end) is not None:
                break
            end += 1
        return end

    def _text(self, walk: _Walk, tokens: list[int], at: int, place: Place) -> None:
        raw, ends = self._student.ends(tokens, place)
        if not raw:
            return
        text, ends, broken = _readable(raw, ends)
        encoded = self._teacher.encode(text, walk.place)
        first = len(walk.ids)
        walk.ids.extend(encoded.ids.tolist())
        walk.place = "inside"
        shared = np.intersect1d(ends, encoded.ends)
        shared = shared[shared > 0]
        # The first token that reaches a byte closes the group; tokens without bytes after it open the next one.
        stops = np.searchsorted(ends, shared) + 1 + at
        their_stops = np.searchsorted(encoded.ends, shared) + 1 + first
        bytes_before = 0
        start, their_start = at, first
        for byte, stop, their_stop in zip(shared.tolist(), stops.tolist(), their_stops.tolist()):
            known = self._teacher.unknown not in walk.ids[their_start:their_stop]
            if known and not any(low < byte and bytes_before < high for low, high in broken):
                walk.groups.append((start, stop, their_start, their_stop))
            start, their_start, bytes_before = stop, their_stop, byte


class _Walk:
    """What has been made of a document so far."""

    def __init__(self, lead: list[int]):
        self.ids: list[int] = lead
        self.groups: list[tuple[int, int, int, int]] = []
        self.place: Place = "mark" if lead else "start"

    def finish(self, weights: np.ndarray) -> Realigned:
        """The groups whose tokens are all trained, and the rest counted."""
        groups = np.array(self.groups, np.int64).reshape(-1, 4)
        ids = np.array(self.ids, np.int32)
        trained = np.concatenate([[0], np.cumsum(weights != 0)])
        kept = trained[groups[:, 1]] - trained[groups[:, 0]] == groups[:, 1] - groups[:, 0]
        kept &= groups[:, 2] > 0  # something precedes it
        groups = groups[kept]
        total = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
        group_weights = total[groups[:, 1]] - total[groups[:, 0]]
        tokens = int((groups[:, 1] - groups[:, 0]).sum())
        return Realigned(
            teacher_ids=ids,
            groups=groups,
            weights=group_weights.astype(np.float32),
            unaligned=int(trained[-1]) - tokens,
            unaligned_weight=float(total[-1] - group_weights.sum()),
        )


def flatten(realigned: Sequence[Realigned], student_starts: Sequence[int], teacher_starts: Sequence[int]) -> GroupRows:
    """The rows of hidden states that a batch's groups need: a token is predicted from the position before it.

    Args:
        realigned: D documents.
        student_starts: flat index of the first token of each document in the student's [B * T] batch.
        teacher_starts: the same in the teacher's.

    Returns:
        Rows of which ``input_ids.flatten()[positions + 1]`` are the targets.
    """
    groups = [document.groups for document in realigned]
    counts = [len(part) for part in groups]
    table = np.concatenate([np.zeros((0, 4), np.int64), *groups])
    out, positions = np.empty_like(table), []
    for column, starts in ((0, student_starts), (2, teacher_starts)):
        lengths = table[:, column + 1] - table[:, column]
        ends = np.cumsum(lengths)
        out[:, column], out[:, column + 1] = ends - lengths, ends
        first = table[:, column] + np.repeat(np.asarray(starts, np.int64), counts) - 1
        positions.append(np.arange(lengths.sum()) + np.repeat(first - out[:, column], lengths))
    weights = np.concatenate([np.zeros(0, np.float32), *(document.weights for document in realigned)])
    return GroupRows(positions[0], positions[1], out, weights)


def _readable(raw: bytes, ends: np.ndarray) -> tuple[str, np.ndarray, list[tuple[int, int]]]:
    """Bytes as a text in which U+FFFD stands for runs that are no UTF-8: the text, ends in its bytes, and those runs.

    An end inside such a run is put between the bytes of the U+FFFD, where no token of a text ends.
    """
    parts, broken, moved, at, size = [], [], ends.copy(), 0, 0
    while at < len(raw):
        try:
            parts.append(raw[at:].decode())
            break
        except UnicodeDecodeError as error:
            good, low, high = raw[at : at + error.start].decode(), at + error.start, at + error.end
        size += len(good.encode())
        shift = size - low
        moved[(ends > low) & (ends < high)] = size + 1
        moved[ends >= high] = ends[ends >= high] + shift + 3 - (high - low)
        broken.append((size, size + 3))
        parts.append(good + "\ufffd")
        at, size = high, size + 3
    return "".join(parts), moved, broken


def _by_bytes(tokenizer: PreTrainedTokenizerFast, pieces: Pieces) -> dict[bytes, int]:
    """The id of each string of bytes; a letter's own token before the token of its byte."""
    table: dict[bytes, int] = {}
    names = token_table(tokenizer)
    for number, piece in enumerate(pieces.bytes):
        if piece and (piece not in table or is_byte_piece(names[table[piece]] or "")):
            table[piece] = number
    return table
