"""A batch as a teacher of another tokenizer reads it, with the groups of tokens in which both sides say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ptl.data.batches import collate_tokens
from ptl.data.realign import Realigner, flatten
from ptl.functional.cross_tokenizer import MatchedIds, matched
from ptl.models.vocabulary import vocabulary_size
from ptl.types import TokenBatch

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
        host, device = batch.on("cpu"), batch.input_ids.device
        owner, ids, mask = (t.flatten().numpy() for t in (host.document_ids, host.input_ids, host.loss_mask))
        places = [np.flatnonzero(owner == document) for document in range(len(host.sources))]
        realigned = [self._realigner(ids[here], mask[here]) for here in places]
        rows = [
            {"ids": document.teacher_ids, "spans": [], "span_weights": [], "source": source}
            for document, source in zip(realigned, host.sources.tolist(), strict=True)
        ]
        layout = "packed" if host.cu_seqlens is not None else "padded"
        teacher = collate_tokens(rows, layout=layout, pad_id=0, window_weight=0.0)
        if teacher.cu_seqlens is not None:
            starts = teacher.cu_seqlens[:-1].tolist()
        else:
            starts = [row * teacher.input_ids.shape[1] for row in range(len(rows))]
        found = flatten(realigned, [int(here[0]) for here in places], starts)
        counts = [len(document.groups) for document in realigned]
        return CrossBatch(
            teacher.on(device),
            *(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in found),
            documents=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(device),
            unaligned=torch.tensor(sum(d.unaligned_weight for d in realigned), dtype=torch.float32, device=device),
        )
