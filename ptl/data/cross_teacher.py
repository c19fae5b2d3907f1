"""A batch as a teacher of another tokenizer reads it, with the groups of tokens in which both sides say the same."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ptl.data.batches import collate_tokens, documents_of, sent
from ptl.data.realign import Realigner, flatten
from ptl.functional.cross_tokenizer import MatchedIds, matched
from ptl.models.vocabulary import vocabulary_size
from ptl.types import Documents, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class CrossBatch(NamedTuple):
    """Both sides of a batch, on the batch's device.

    Attributes:
        teacher: the teacher's own ids; no token of it is trained.
        student_positions: int64 [N], flat positions that predict the groups' student tokens.
        teacher_positions: int64 [M], the same of the teacher.
        groups: int64 [G, 4], rows of these two; see ``ptl.data.realign.GroupRows``.
        weights: float32 [G].
        documents: int64 [G], the document of each group.
        unaligned: float32 [], loss weight of trained tokens that are in no group.
    """

    teacher: TokenBatch
    student_positions: Tensor
    teacher_positions: Tensor
    groups: Tensor
    weights: Tensor
    documents: Tensor
    unaligned: Tensor


class CrossTeacher:
    """Realigns batches for a teacher of another tokenizer; made once a run.

    Attributes:
        student_vocabulary: ids of the student's tokenizer; the rest of its head is padding.
        teacher_vocabulary: the same of the teacher.

    Arguments:
        student_tokenizer: of the batches.
        teacher_tokenizer: of the teacher.
    """

    def __init__(self, student_tokenizer: PreTrainedTokenizerFast, teacher_tokenizer: PreTrainedTokenizerFast) -> None:
        self._realigner = Realigner(student_tokenizer, teacher_tokenizer)
        self.student_vocabulary = vocabulary_size(student_tokenizer)
        self.teacher_vocabulary = vocabulary_size(teacher_tokenizer)

    def matched_ids(self, device: torch.device) -> MatchedIds:
        """The ids that stand for the same bytes on both sides."""
        ours, theirs = (torch.from_numpy(ids).to(device) for ids in self._realigner.matched)
        return matched(ours, theirs, self.student_vocabulary, self.teacher_vocabulary)

    def __call__(self, batch: TokenBatch) -> CrossBatch:
        documents, device = documents_of(batch), batch.input_ids.device
        realigned = [
            self._realigner(documents.ids[begin:end], documents.weights[begin:end])
            for begin, end in itertools.pairwise(documents.bounds.tolist())
        ]
        rows = [{"ids": each.teacher_ids, "spans": [], "span_weights": [], "source": 0} for each in realigned]
        layout = "packed" if batch.cu_seqlens is not None else "padded"
        teacher = collate_tokens(rows, layout=layout, pad_id=0, window_weight=0.0)
        found = flatten(realigned, _starts(batch, documents), _starts(teacher, documents_of(teacher)))
        owners = np.repeat(np.arange(len(rows)), [len(each.groups) for each in realigned])
        tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in (*found, owners))
        return CrossBatch(
            TokenBatch(*sent(teacher, device))._replace(sources=batch.sources),
            *sent(tensors, device),
            unaligned=torch.full(
                (), sum(each.unaligned_weight for each in realigned), dtype=torch.float32, device=device
            ),
        )


def _starts(batch: TokenBatch, documents: Documents) -> list[int]:
    """Flat index in [B * T] of the first token of each document."""
    if batch.cu_seqlens is not None:
        return documents.bounds[:-1].tolist()
    return [row * batch.input_ids.shape[1] for row in range(len(documents.bounds) - 1)]
