"""Rankings as documents: every answer of a prompt rendered once, with what the answers share stored once.

A stored example is one prompt: ``ids`` is the shared prefix and then the rest of each answer's document, ``prefix`` its
length and ``suffixes`` the lengths of the rests. Since attention is causal, a prefix that is computed once serves every
answer exactly.

Shape letters: K answers of a prompt, D answers of a batch, P prompts, S segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Features, List, Value

from ptl.data.batches import Layout, mask_of, spans_of
from ptl.data.render import Renderer, RenderError, TooLong, Truncation
from ptl.data.truncation import exchanges
from ptl.data.views import Example, View
from ptl.types import Conversation, GroupBatch, Ranking, TokenBatch, Tokens


class RankingView(View):
    """Rankings as groups of documents; batches are ``GroupBatch``.

    Arguments:
        share_prompt: in the packed layout, compute what a prompt's answers have in common once for all of them.
        need_scores: refuse rows without scores, of which a margin is made.
    """

    record = Ranking
    features = Features(
        {
            "ids": List(Value("int32")),
            "prefix": Value("int32"),
            "suffixes": List(Value("int32")),
            "ranks": List(Value("float32")),
            "scores": List(Value("float32")),
            "spans": List(Value("int32")),
            "span_weights": List(Value("float32")),
            "length": Value("int32"),
            "weight": Value("float32"),
            "truncated": Value("bool"),
            "lost_end": Value("bool"),
        }
    )

    def __init__(self, *, share_prompt: bool = True, need_scores: bool = False) -> None:
        self.share_prompt, self.need_scores = share_prompt, need_scores

    @property
    def settings(self) -> dict[str, Any]:
        return {"need_scores": self.need_scores}

    def encode(
        self, records: Sequence[Ranking], renderer: Renderer, max_length: int, truncation: Truncation
    ) -> list[list[Example] | RenderError]:
        """Renders the answers of all records in one tokenizer call."""
        conversations = [one for record in records for one in _conversations(record)]
        rendered = iter(renderer.render_batch(conversations))
        encoded: list[list[Example] | RenderError] = []
        for record in records:
            documents = [next(rendered) for _ in record.completions]
            try:
                encoded.append([self._example(record, documents, renderer, max_length, truncation)])
            except RenderError as refusal:
                encoded.append(refusal)
        return encoded

    def _example(
        self, record: Ranking, documents: Any, renderer: Renderer, max_length: int, truncation: Truncation
    ) -> Example:
        if self.need_scores and record.scores is None:
            raise RenderError("no_scores", "the row has no scores or margin; model.loss margin is made of them")
        tokens = _single(documents)
        if max(len(one.ids) for one in tokens) > max_length:
            tokens = _fitted(record, tokens, renderer, max_length, truncation)
        return _stored(record, tokens)

    def collate(
        self, rows: Sequence[Mapping[str, Any]], *, layout: Layout, pad_id: int, window_weight: float
    ) -> GroupBatch:
        return collate_groups(
            rows, layout=layout, pad_id=pad_id, window_weight=window_weight, share_prompt=self.share_prompt
        )

    def without_weight(self, row: Mapping[str, Any]) -> Example:
        return {**row, "spans": np.zeros(0, np.int32), "span_weights": np.zeros(0, np.float32), "weight": 0.0}

    def documents(self, example: Example) -> list[Example]:
        """Each answer with its prompt."""
        shown = []
        for segment, rank in zip(_segments(example, 0, 0, False), example["ranks"]):
            spans, span_weights = spans_of(segment.mask)
            note = "not ranked" if np.isnan(rank) else f"rank {rank:g}"
            own = {"ids": segment.ids, "spans": spans, "span_weights": span_weights, "length": len(segment.ids)}
            shown.append({**example, **own, "note": note})
        return shown


# ---- from a ranking to an example ----


def _conversations(record: Ranking) -> list[Conversation]:
    """Prompt and answer of each completion; what the prompt says is context, whoever says it."""
    prompt = tuple(replace(message, train=0.0) for message in record.prompt)
    return [
        Conversation(messages=prompt + completion, tools=record.tools, origin=record.origin)
        for completion in record.completions
    ]


def _single(documents: Sequence[list[Tokens] | RenderError]) -> list[Tokens]:
    """The one document of each answer.

    Raises:
        RenderError: an answer cannot be rendered, or is printed differently once it goes on.
    """
    tokens = []
    for number, made in enumerate(documents):
        if isinstance(made, RenderError):
            raise made
        if len(made) != 1:
            raise RenderError(
                "rewritten_history",
                f"answer {number}: the template prints its earlier turns differently once others follow, so it is no "
                "single text; set data.policy.history to single_pass",
            )
        tokens.append(made[0])
    return tokens


def _fitted(
    record: Ranking, tokens: list[Tokens], renderer: Renderer, max_length: int, truncation: Truncation
) -> list[Tokens]:
    """The documents cut to ``max_length``; a cut answer gets no end that it did not have.

    Raises:
        TooLong: by policy, or because nothing of an answer would be left.
    """
    longest = max(len(one.ids) for one in tokens)
    if truncation == "keep_start":
        cut = [_cut(one, max_length) for one in tokens]
        if not all(one.loss_mask.any() for one in cut):
            raise TooLong("nothing_left", f"nothing of an answer is left after truncation to {max_length}")
        return cut
    if truncation == "drop_oldest_turns":
        head, starts = exchanges(record.prompt)
        for start in starts[1:]:
            shorter = replace(record, prompt=record.prompt[:head] + record.prompt[start:])
            fitting = _single(renderer.render_batch(_conversations(shorter)))
            if max(len(one.ids) for one in fitting) <= max_length:
                return [replace(one, truncated=True) for one in fitting]
    raise TooLong(
        "too_long",
        f"{longest} tokens in the longest answer with its prompt, more than max_length {max_length}; raise max_length, "
        "or set truncation to drop, keep_start or drop_oldest_turns",
    )


def _cut(tokens: Tokens, max_length: int) -> Tokens:
    if len(tokens.ids) <= max_length:
        return tokens
    return Tokens(tokens.ids[:max_length], tokens.loss_mask[:max_length], truncated=True, lost_end=True)


def _stored(record: Ranking, tokens: Sequence[Tokens]) -> Example:
    prefix = shared_prefix(tokens)
    masks = [np.array(one.loss_mask, np.float32) for one in tokens]
    for mask in masks:
        mask[:1] = 0.0
    spans, span_weights = spans_of(np.concatenate([masks[0][:prefix], *(mask[prefix:] for mask in masks)]))
    scores = record.scores if record.scores is not None else (float("nan"),) * len(tokens)
    return {
        "ids": np.concatenate([tokens[0].ids[:prefix], *(one.ids[prefix:] for one in tokens)]).astype(np.int32),
        "prefix": prefix,
        "suffixes": np.asarray([len(one.ids) - prefix for one in tokens], np.int32),
        "ranks": np.asarray(record.ranks, np.float32),
        "scores": np.asarray(scores, np.float32),
        "spans": spans,
        "span_weights": span_weights,
        "length": sum(len(one.ids) for one in tokens),
        "weight": 1.0,
        "truncated": any(one.truncated for one in tokens),
        "lost_end": any(one.lost_end for one in tokens),
    }


def shared_prefix(documents: Sequence[Tokens]) -> int:
    """How many first tokens all documents have in common, none of them trained, and none a whole document."""
    shortest = min(len(one.ids) for one in documents)
    first_trained = min(int(np.argmax(one.loss_mask > 0)) for one in documents)
    most = min(shortest - 1, first_trained)
    first = documents[0].ids[:most]
    for one in documents[1:]:
        different = np.flatnonzero(one.ids[:most] != first[:most])
        most = int(different[0]) if len(different) else most
    return most


# ---- from examples to a batch ----


class _Segment(NamedTuple):
    """Consecutive tokens of one document: ``start`` is the position of the first."""

    ids: np.ndarray
    mask: np.ndarray
    start: int
    parent: int
    prompt: int


def collate_groups(
    rows: Sequence[Mapping[str, Any]], *, layout: Layout, pad_id: int, window_weight: float, share_prompt: bool
) -> GroupBatch:
    """One micro-batch of P prompts.

    Args:
        rows: examples of ``RankingView`` with their ``source`` and, from prepared data, their index ``row``.
        layout: ``packed``, all segments in one row; ``padded``, a document a row.
        pad_id: fills a padded row; padding is told by length, never by its id.
        window_weight: prompts over the optimizer window and all ranks.
        share_prompt: packed, make the shared prefix a segment of its own.
    """
    segments: list[_Segment] = []
    answers: list[tuple[int, int]] = []  # of each answer, its own segment and that of its prefix, or twice the same
    for prompt, row in enumerate(rows):
        shared = share_prompt and layout == "packed" and row["prefix"] > 0 and len(row["suffixes"]) > 1
        made = _segments(row, prompt, len(segments), shared)
        first = len(segments) + (1 if shared else 0)
        answers += [(first + k, len(segments) if shared else first + k) for k in range(len(row["suffixes"]))]
        segments += made
    tokens, offsets = _token_batch(segments, rows, layout, pad_id, window_weight)
    return _group_batch(segments, answers, offsets, rows, tokens)


def _segments(row: Mapping[str, Any], prompt: int, number: int, shared: bool) -> list[_Segment]:
    """The segments of a prompt, the first of which gets ``number``."""
    ids, prefix = np.asarray(row["ids"], np.int64), int(row["prefix"])
    mask = mask_of(len(ids), row["spans"], row["span_weights"])
    bounds = prefix + np.concatenate([[0], np.cumsum(row["suffixes"])]).astype(np.int64)
    made = [_Segment(ids[:prefix], mask[:prefix], 0, -1, prompt)] if shared else []
    for begin, end in itertools.pairwise(bounds):
        if shared:
            made.append(_Segment(ids[begin:end], mask[begin:end], prefix, number, prompt))
        else:
            whole, weights = (np.concatenate([of[:prefix], of[begin:end]]) for of in (ids, mask))
            made.append(_Segment(whole, weights, 0, -1, prompt))
    return made


def _token_batch(
    segments: Sequence[_Segment],
    rows: Sequence[Mapping[str, Any]],
    layout: Layout,
    pad_id: int,
    window_weight: float,
) -> tuple[TokenBatch, np.ndarray]:
    """The segments as a batch, and the flat position of the first token of each."""
    lengths = np.array([len(segment.ids) for segment in segments], np.int64)
    packed = layout == "packed"
    width = int(lengths.sum() if packed else lengths.max())
    shape = (1 if packed else len(segments), width)
    offsets = np.concatenate([[0], np.cumsum(lengths)])[:-1] if packed else np.arange(len(segments)) * width
    ids, mask = np.full(shape, pad_id, np.int64).reshape(-1), np.zeros(shape, np.float32).reshape(-1)
    positions, documents = np.zeros(ids.shape, np.int64), np.full(ids.shape, -1, np.int64)
    for number, (segment, offset, length) in enumerate(zip(segments, offsets, lengths)):
        here = slice(offset, offset + length)
        ids[here], mask[here], documents[here] = segment.ids, segment.mask, number
        positions[here] = np.arange(segment.start, segment.start + length)
    owners = [segment.prompt for segment in segments]
    known = all("row" in row for row in rows)
    bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    batch = TokenBatch(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        loss_mask=torch.from_numpy(mask.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        document_ids=torch.from_numpy(documents.reshape(shape)),
        sources=torch.tensor([int(rows[owner]["source"]) for owner in owners]),
        window_weight=torch.tensor(window_weight, dtype=torch.float64),
        cu_seqlens=bounds if packed else None,
        attention_mask=None if packed else torch.from_numpy((documents >= 0).astype(np.int64).reshape(shape)),
        rows=torch.tensor([int(rows[owner]["row"]) for owner in owners]) if known else None,
        host_lengths=lengths,
    )
    return batch, offsets


def _group_batch(
    segments: Sequence[_Segment],
    answers: Sequence[tuple[int, int]],
    offsets: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    tokens: TokenBatch,
) -> GroupBatch:
    counts = [len(row["suffixes"]) for row in rows]
    ranks = np.concatenate([np.asarray(row["ranks"], np.float32) for row in rows])
    groups = np.repeat(np.arange(len(rows)), counts)
    pairs, shares, tied = ranked_pairs(ranks, counts)
    targets, sources, owners, weights = [], [], [], []
    for number, (own, prefix) in enumerate(answers):
        segment = segments[own]
        trained = np.flatnonzero(segment.mask)
        # The first token of a rest is predicted by the last one of what it goes on from.
        before = offsets[own] + trained - 1
        if own != prefix:
            before[trained == 0] = offsets[prefix] + len(segments[prefix].ids) - 1
        targets.append(segment.ids[trained])
        sources.append(before)
        owners.append(np.full(len(trained), number))
        weights.append(segment.mask[trained])
    parents = np.array([segment.parent for segment in segments], np.int64)

    def flat(parts: list[np.ndarray], kind: Any) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(kind))

    return GroupBatch(
        tokens=tokens,
        parents=parents if parents.max() >= 0 else None,
        last=torch.tensor([int(offsets[own]) + len(segments[own].ids) - 1 for own, _ in answers]),
        groups=torch.from_numpy(groups),
        ranks=torch.from_numpy(ranks),
        scores=flat([np.asarray(row["scores"]) for row in rows], np.float32),
        lengths=flat([np.asarray(row["suffixes"]) for row in rows], np.int64),
        prompt_weights=torch.tensor([float(row["weight"]) for row in rows]),
        prompt_sources=torch.tensor([int(row["source"]) for row in rows]),
        pairs=torch.from_numpy(pairs),
        pair_shares=torch.from_numpy(shares),
        tied=torch.from_numpy(tied),
        targets=flat(targets, np.int64),
        predicted_from=flat(sources, np.int64),
        owners=flat(owners, np.int64),
        target_weights=flat(weights, np.float32),
    )


def ranked_pairs(ranks: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of ranked answers, prompt after prompt.

    Args:
        ranks: [D], lower is better; NaN takes part in no pair.
        counts: answers of each prompt.

    Returns:
        Better and worse answer int64 [2, N] (of a tie, the earlier one first), the share of each pair in its prompt
        float32 [N], 1 over the number of the prompt's pairs, and which are tied bool [N].
    """
    pairs, shares, tied = [np.zeros((2, 0), np.int64)], [np.zeros(0, np.float32)], [np.zeros(0, bool)]
    begin = 0
    for count in counts:
        ranked = np.flatnonzero(np.isfinite(ranks[begin : begin + count])) + begin
        one, other = (ranked[index] for index in np.triu_indices(len(ranked), 1))
        swap = ranks[one] > ranks[other]
        pairs.append(np.stack([np.where(swap, other, one), np.where(swap, one, other)]))
        shares.append(np.full(len(one), 1 / max(1, len(one)), np.float32))
        tied.append(ranks[one] == ranks[other])
        begin += count
    return np.concatenate(pairs, 1), np.concatenate(shares), np.concatenate(tied)
