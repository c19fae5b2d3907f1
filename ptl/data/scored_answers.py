"""Single answers under a reward model: each printed and computed by itself, as in the model's training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from ptl.data.batches import mask_of
from ptl.data.groups import RankingView, shared_prefix
from ptl.data.render import Renderer, RenderError, TooLong
from ptl.data.reward_models import RewardModel
from ptl.data.scored_rankings import computed_scores
from ptl.data.views import Example
from ptl.types import Message, Prompt, Ranking, Tokens

_ANY_LENGTH = 2**31 - 1


class Scored(NamedTuple):
    """An answer's score, finite or not, and whether turns of its prompt were left out for it."""

    value: float
    shortened: bool


def score_answers(
    reward: RewardModel, prompts: Sequence[Prompt], answers: Sequence[str], *, batch_tokens: int, cut: bool = False
) -> list[Scored | RenderError]:
    """The score of each conversation: a prompt's turns and one of the assistant.

    Equal conversations are computed once. What the answers to a prompt start with is computed once for those that share
    a forward pass.

    Args:
        reward: an opened reward model.
        prompts: of each answer.
        answers: what the assistant says; may be empty.
        batch_tokens: most tokens of a forward pass; one conversation alone may have more.
        cut: of a conversation that is too long leave out the oldest exchanges, as few as let it fit.

    Returns:
        In the place of an answer that has no score what the renderer says; ``too_long``; or ``end_inside``, where the
        answer spells out the end of its own turn and would be read as several.
    """
    asked = [(repr((prompt.messages, prompt.tools)), answer) for prompt, answer in zip(prompts, answers)]
    firsts = {key: place for place, key in reversed(list(enumerate(asked)))}
    records = [_record(prompts[place], answers[place]) for place in firsts.values()]
    rendered = dict(zip(firsts, render_answers(records, reward.renderer, reward.max_length, cut=cut)))
    examples = {key: made for key, made in rendered.items() if not isinstance(made, RenderError)}
    groups: dict[str, list[Example]] = {}
    for (prompt, _), example in examples.items():
        groups.setdefault(prompt, []).append(example)
    scores = _scores(reward.model, list(groups.values()), batch_tokens)
    results: dict[tuple[str, str], Scored | RenderError] = {}
    for key, made in rendered.items():
        known = isinstance(made, RenderError)
        results[key] = made if known else Scored(scores[id(made)], bool(made["truncated"]))
    return [results[key] for key in asked]


# ---- rendering ----


def render_answers(
    records: Sequence[Ranking], renderer: Renderer, max_length: int, *, cut: bool = False
) -> list[Example | RenderError]:
    """Rankings of one answer as examples of ``RankingView``, or why they are none; see ``score_answers``."""
    view = RankingView()
    made: list[Example | RenderError] = []
    for record, one in zip(records, view.encode(records, renderer, _ANY_LENGTH, "error")):
        example = one if isinstance(one, RenderError) else _unforged(one[0], renderer)
        if not isinstance(example, RenderError) and len(example["ids"]) > max_length:
            told = f"{len(example['ids'])} tokens with its prompt, more than the {max_length} that the model holds"
            fitted = view.encode([record], renderer, max_length, "drop_oldest_turns")[0] if cut else None
            more = ", and so is its last exchange alone" if cut else ""
            example = fitted[0] if isinstance(fitted, list) else TooLong("too_long", told + more)
        made.append(example)
    return made


def _record(prompt: Prompt, answer: str) -> Ranking:
    turn = (Message(role="assistant", content=answer),)
    return Ranking(prompt=prompt.messages, completions=(turn,), ranks=(1.0,), tools=prompt.tools, origin=prompt.origin)


def _unforged(example: Example, renderer: Renderer) -> Example | RenderError:
    """The example, unless its answer holds an end of turn before its own: what follows could be anybody's turn."""
    spans = example["spans"]
    said = np.asarray(example["ids"])[spans[0] : spans[-1] - 1] if len(spans) else np.zeros(0)
    ends = said[np.isin(said, renderer.terminators)]
    if not len(ends):
        return example
    token = renderer.tokenizer.convert_ids_to_tokens(int(ends[0]))
    told = f"the answer holds {token!r}, the reward model's end of a turn, and would be read as several turns"
    return RenderError("end_inside", told)


# ---- scoring ----


def _scores(model: nn.Module, groups: Sequence[Sequence[Example]], batch_tokens: int) -> dict[int, float]:
    """The score of each example by its ``id``; the examples of a group answer one prompt."""
    chunks = [chunk for group in groups for chunk in _chunks(group, batch_tokens)]
    found = computed_scores(model, [_joined(chunk) for chunk in chunks], batch_tokens=batch_tokens)
    return {id(one): float(score) for chunk, own in zip(chunks, found) for one, score in zip(chunk, own)}


def _chunks(group: Sequence[Example], batch_tokens: int) -> Iterator[Sequence[Example]]:
    """A prompt's answers, longest first, as many at a time as a padded batch could hold: a packed one holds more."""
    ordered = sorted(group, key=lambda example: -len(example["ids"]))
    while ordered:
        count = max(1, batch_tokens // len(ordered[0]["ids"]))
        yield ordered[:count]
        ordered = ordered[count:]


def _joined(examples: Sequence[Mapping[str, Any]]) -> Example:
    """Examples of one answer each as one of several, with what all start with kept once; to be scored, not trained."""
    documents = [
        Tokens(np.asarray(one["ids"], np.int32), mask_of(len(one["ids"]), one["spans"], one["span_weights"]))
        for one in examples
    ]
    prefix = shared_prefix(documents)
    unknown = np.full(len(documents), np.nan, np.float32)
    return {
        **examples[0],
        "ids": np.concatenate([documents[0].ids[:prefix], *(one.ids[prefix:] for one in documents)]),
        "prefix": prefix,
        "suffixes": np.asarray([len(one.ids) - prefix for one in documents], np.int32),
        "ranks": unknown,
        "scores": unknown,
        "spans": np.zeros(0, np.int32),
        "span_weights": np.zeros(0, np.float32),
    }
