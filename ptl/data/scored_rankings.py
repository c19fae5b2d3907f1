"""Rankings of a file under a reward model: read, rendered by that model's template, scored, measured.

Nothing is cut and nothing is lost: a row that cannot be read, printed or held by the model is counted under its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ptl.data.audit import Reason
from ptl.data.batches import Layout
from ptl.data.encode import note
from ptl.data.files import resolve
from ptl.data.groups import RankingView, ranked_pairs
from ptl.data.rankings import parse_ranking
from ptl.data.readers import first_rows, rows_of
from ptl.data.render import Renderer, RenderError
from ptl.data.sources import BadRow, Source, format_of
from ptl.data.views import Example
from ptl.functional.ranking_measures import measures_of, ranking_sums
from ptl.functional.score_agreement import best_of
from ptl.models.scoring import answer_scores
from ptl.types import GroupBatch, Ranking

SUBSET = "subset"
"""The column that RewardBench names its parts in."""
NO_SUBSET = "(none)"
Scores = list[np.ndarray]
"""A float32 array [K] for each prompt."""
Progress = Callable[[int], None]


# ---- reading ----


@dataclass
class RankingRows:
    """The rankings of a file.

    Attributes:
        records: the rows that were read.
        subsets: of each record, the text in its subset column; None where the file has no such column.
        read: rows of the file, good or bad.
        left_out: reason -> rows that are no record.
    """

    records: list[Ranking] = field(default_factory=list)
    subsets: list[str] | None = None
    read: int = 0
    left_out: dict[str, Reason] = field(default_factory=dict)


def read_rankings(path: str, *, subset_column: str | None = None) -> RankingRows:
    """Every row of a file of rankings.

    Args:
        path: as ``Source.path``; rows in any form that ``parse_ranking`` knows.
        subset_column: names the part a row belongs to; None takes ``subset`` where there is one.

    Raises:
        ValueError: no such file, rows that are no rankings, no row that is one, or no such column.
    """
    source = Source(path=path, format="ranking")
    files = resolve(source)
    first = first_rows(source, files=files)
    if first and not any(format_of(row) == "ranking" for row in first):
        raise ValueError(
            f"{path}: its rows are no rankings, they have the keys {sorted(first[0])[:20]}; expected chosen and "
            "rejected, or completions with ranks or scores"
        )
    rows, names = RankingRows(), []
    column = subset_column or SUBSET
    for origin, row in rows_of(source, files):
        rows.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            rows.records.append(parse_ranking(row, source, origin))
            names.append(row.get(column))
        except BadRow as bad:
            note(rows.left_out, bad.reason, origin, bad.detail)
    if not rows.records:
        told = "; ".join(reason.examples[0] for reason in rows.left_out.values())
        raise ValueError(f"{path} has no ranking among its {rows.read} rows: {told or 'it is empty'}")
    if any(name is not None for name in names):
        rows.subsets = [NO_SUBSET if name is None else str(name) for name in names]
    elif subset_column is not None:
        raise ValueError(f"{path}: no row has a column {subset_column!r} for its subset; name another")
    return rows


# ---- rendering ----


@dataclass
class RenderedRankings:
    """Examples of ``RankingView`` for one model: None where it cannot print or hold a row.

    Attributes:
        examples: by record.
        left_out: reason -> rows.
    """

    examples: list[Example | None]
    left_out: dict[str, Reason]


def render_rankings(records: Sequence[Ranking], renderer: Renderer, max_length: int) -> RenderedRankings:
    """The documents of the records as a model with this renderer reads them.

    Args:
        records: rankings.
        renderer: of the model, with the template it was trained on.
        max_length: most tokens of an answer with its prompt; a row with a longer one is left out as ``too_long``.
    """
    left_out: dict[str, Reason] = {}
    examples: list[Example | None] = []
    for start in range(0, len(records), 512):
        some = records[start : start + 512]
        for record, made in zip(some, RankingView().encode(some, renderer, max_length, "drop")):
            if isinstance(made, RenderError):
                detail = made.detail
                if made.reason == "too_long":
                    detail = f"an answer with its prompt is longer than the {max_length} tokens that the model holds"
                note(left_out, made.reason, record.origin, detail)
            examples.append(None if isinstance(made, RenderError) else made[0])
    return RenderedRankings(examples, left_out)


# ---- scoring ----


def score_examples(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_tokens: int,
    progress: Progress = lambda count: None,
) -> Scores:
    """``computed_scores``, all of them finite.

    Raises:
        ValueError: a score that is not finite.
    """
    scores = computed_scores(model, examples, batch_tokens=batch_tokens, progress=progress)
    bad = next((i for i, own in enumerate(scores) if not np.isfinite(own).all()), None)
    if bad is not None:
        raise ValueError(f"the scores of prompt {bad + 1} are not finite: {scores[bad].tolist()}")
    return scores


def computed_scores(
    model: nn.Module,
    examples: Sequence[Mapping[str, Any]],
    *,
    batch_tokens: int,
    progress: Progress = lambda count: None,
) -> Scores:
    """The scores of each prompt's answers, float32 [K], in the order of ``examples``.

    Answers of a prompt share its tokens, prompts share a batch, nothing is padded; a model that cannot keep packed
    documents apart is given padded batches.

    Args:
        model: a reward model, on its device.
        examples: of ``RankingView``.
        batch_tokens: most tokens of a forward pass; one prompt alone may have more.
        progress: told how many prompts more are done.
    """
    device = next(model.parameters()).device
    scores: Scores = [np.zeros(0, np.float32)] * len(examples)
    layout: Layout = "packed"
    waiting = list(batches(examples, batch_tokens, layout))[::-1]
    while waiting:
        chosen = waiting.pop()
        try:
            found = answer_scores(model, _batch([examples[i] for i in chosen], layout, device)).cpu().numpy()
        except ValueError:
            if layout == "padded":
                raise
            # The model takes no packed rows, which shows at the first of them.
            layout, waiting = "padded", list(batches(examples, batch_tokens, "padded"))[::-1]
            continue
        counts = [len(examples[i]["suffixes"]) for i in chosen]
        for i, own in zip(chosen, np.split(found, np.cumsum(counts)[:-1])):
            scores[i] = own
        progress(len(chosen))
    return scores


def batches(examples: Sequence[Mapping[str, Any]], batch_tokens: int, layout: Layout) -> Iterator[list[int]]:
    """Indices of prompts that share a forward pass; the longest come first, so that memory runs out early or never."""
    longest = [int(example["prefix"]) + int(max(example["suffixes"])) for example in examples]
    here: list[int] = []
    answers = tokens = width = 0
    for index in sorted(range(len(examples)), key=lambda i: -longest[i]):
        answers += len(examples[index]["suffixes"])
        tokens += len(examples[index]["ids"])
        width = max(width, longest[index])
        if here and (tokens if layout == "packed" else answers * width) > batch_tokens:
            yield here
            here, width = [], longest[index]
            answers, tokens = len(examples[index]["suffixes"]), len(examples[index]["ids"])
        here.append(index)
    if here:
        yield here


def _batch(examples: Sequence[Mapping[str, Any]], layout: Layout, device: torch.device) -> GroupBatch:
    rows = [{**example, "source": 0} for example in examples]
    batch = RankingView().collate(rows, layout=layout, pad_id=0, window_weight=1.0)
    return batch._replace(tokens=batch.tokens.on(device), last=batch.last.to(device))


# ---- measuring ----


def measure(scores: Sequence[np.ndarray], examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The measures of ``measures_of`` over prompts, and ``best_of_k`` over those with more than two answers.

    Args:
        scores: [K] of each prompt.
        examples: their examples, for ranks and lengths.
    """
    counts = [len(own) for own in scores]
    ranks = np.concatenate([np.asarray(example["ranks"], np.float32) for example in examples])
    pairs, _, tied = ranked_pairs(ranks, counts)
    sums = ranking_sums(
        torch.from_numpy(np.concatenate(scores)),
        torch.from_numpy(np.concatenate([np.asarray(example["suffixes"], np.int64) for example in examples])),
        torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        torch.from_numpy(pairs),
        torch.from_numpy(tied),
        torch.ones(len(counts)),
    )
    firsts = [
        best_of(torch.as_tensor(own), torch.as_tensor(np.asarray(example["ranks"])))
        for own, example in zip(scores, examples)
        if len(own) > 2
    ]
    known = [value for value in firsts if value is not None]
    best = sum(known) / len(known) if known else None
    return {"prompts": len(counts), **measures_of(sums), "best_of_k": best, "best_of_k_prompts": len(known)}


def all_pairs(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of each answer int64 [D], and every pair of answers of one prompt int64 [2, N]."""
    order = np.concatenate([np.arange(count, dtype=np.float32) for count in counts])
    return np.repeat(np.arange(len(counts)), counts), ranked_pairs(order, counts)[0]
