"""From a row to a ``Ranking``: answers to one prompt and their order, in every shape that such rows are published in.

============================================================  =======================================================
row                                                           ranks (1 is best)
============================================================  =======================================================
``completions: [{messages | response | answer, rank | ...}]``  ``rank`` as given, else from ``score``
``completions | responses: [...]``, ``ranks`` or ``scores``    as given, else from ``scores``
``chosen``, ``rejected``                                       1 and 2; lists of answers are tied among themselves
============================================================  =======================================================

The prompt stands in ``prompt`` or ``instruction``, or is what whole dialogues or transcripts have in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from ptl.data.fields import as_turns, required, system_turn
from ptl.data.messages import kind, optional_text, parse_tools
from ptl.data.sources import BadRow, LeftOut, Source
from ptl.data.transcripts import OPENING, looks_like_transcript, parse_transcript
from ptl.types import Message, Origin, Ranking

Turns = tuple[Message, ...]

LEFT_OUT: Mapping[str, str] = {"skipped": "not_ranked", "flagged": "not_ranked", "superseded": "superseded"}
"""``status`` of a row that nobody is to learn from -> the reason under which it is counted."""
LIST_KEYS = ("completions", "responses")
PROMPT_KEYS = ("prompt", "instruction")
ANSWER_KEYS = ("messages", "response", "answer")
"""Where an answer that is an object has its text or its messages."""
SCORE_KEYS = ("score", "overall_score", "fine-grained_score")
"""Where it has its score; of a row the first that any of its answers has."""


def parse_ranking(row: Mapping[str, Any], source: Source, origin: Origin) -> Ranking:
    """The ranking that a row holds. An answer without a rank stays, with NaN; so do answers that are equal.

    Raises:
        LeftOut: its status says that it was not ranked, or ranked anew later.
        BadRow: a verdict that was revised in a file that was not settled, fewer than two ranked answers, ranks and
            scores that contradict each other, or a field that cannot be read.
    """
    status = row.get("status")
    if isinstance(status, str) and status in LEFT_OUT:
        raise LeftOut(LEFT_OUT[status], f"status is {status!r}")
    if status == "ranked" and row.get("settled") is not True and row.get("revision", 1) != 1:
        # An earlier verdict of the same person stands above it in the file, unmarked, and would be learned from too.
        told = f"the row is revision {row['revision']} of a verdict, and the file does not say which one stands"
        raise BadRow("revised", f"{told}: run `ptl rank settle {source.path}`")
    given = _given_prompt(row, source)
    key = next((key for key in LIST_KEYS if row.get(key) is not None), None)
    answers, ranks, scores = _pair(row, given, source) if key is None else _list(row, key, given, source)
    prompt, completions = _parted(given, answers)
    for i, completion in enumerate(completions):
        if completion[0].role != "assistant" or completion[-1].role != "assistant":
            raise BadRow("bad_ranking", f"answer {i} does not start and end with an assistant turn")
    ranks, scores = _ordered(ranks, scores, len(completions))
    return Ranking(
        prompt=system_turn(row, prompt) + prompt,
        completions=tuple(completions),
        ranks=ranks,
        scores=scores,
        annotator=optional_text(row.get("annotator"), "annotator"),
        tools=parse_tools(row.get("tools")),
        origin=origin,
    )


# ---- answers ----


def _list(
    row: Mapping[str, Any], key: str, prompt: Turns | None, source: Source
) -> tuple[list[Turns], list[float] | None, list[float] | None]:
    """Answers, ranks and scores of a row that lists its answers."""
    items = row[key]
    if not isinstance(items, list | tuple):
        raise BadRow("wrong_type", f"{key} is {kind(items)}; expected a list of answers")
    answers, ranks, scores = [], [], []
    objects = [item for item in items if isinstance(item, Mapping)]
    score_key = next((name for name in SCORE_KEYS if any(item.get(name) is not None for item in objects)), None)
    for i, item in enumerate(items):
        at, rank, score = f"{key}[{i}]", None, None
        if isinstance(item, Mapping) and not {"role", "from"} & set(item):
            rank, score = item.get("rank"), None if score_key is None else item.get(score_key)
            name = next((name for name in ANSWER_KEYS if item.get(name) is not None), None)
            if name is None:
                raise BadRow("missing_key", f"{at} has none of {list(ANSWER_KEYS)}; its keys are {sorted(item)[:20]}")
            at, item = f"{at}.{name}", item[name]
        answers.append(_answer(item, at, prompt, source))
        ranks.append(rank)
        scores.append(score)
    return answers, _column(row, "ranks", ranks), _column(row, "scores", scores)


def _column(row: Mapping[str, Any], name: str, own: list[Any]) -> list[float] | None:
    """The numbers of a column, or, where the row has none, those that the answers have themselves."""
    values = own if row.get(name) is None else row[name]
    if not isinstance(values, list | tuple) or len(values) != len(own):
        count = f" of {len(values)}" if isinstance(values, list | tuple) else ""
        raise BadRow(
            "bad_ranking", f"{name} is {kind(values)}{count}; expected a number for each of {len(own)} answers"
        )
    return _numbers(values, name)


def _pair(
    row: Mapping[str, Any], prompt: Turns | None, source: Source
) -> tuple[list[Turns], list[float], list[float] | None]:
    """Answers, ranks and scores of ``chosen`` and ``rejected``, each an answer or a list of answers."""
    sides = []
    for key in ("chosen", "rejected"):
        value = required(row, key, source)
        several = isinstance(value, list | tuple) and not any(isinstance(item, Mapping) for item in value)
        if several and not value:
            raise BadRow("bad_ranking", f"{key} has no answer")
        named = [(f"{key}[{i}]", item) for i, item in enumerate(value)] if several else [(key, value)]
        sides.append([_answer(item, at, prompt, source) for at, item in named])
    sizes = [len(side) for side in sides]
    if row.get("margin") is not None:
        pair: Sequence[Any] = (row["margin"], 0.0)
    else:
        pair = (row.get("score_chosen"), row.get("score_rejected"))
    values = _numbers(pair, "margin or score_chosen and score_rejected")
    scores = None if values is None else [values[side] for side in (0, 1) for _ in range(sizes[side])]
    return sides[0] + sides[1], [1.0] * sizes[0] + [2.0] * sizes[1], scores


def _answer(value: Any, at: str, prompt: Turns | None, source: Source) -> Turns:
    """An answer's turns, or, of a whole dialogue, all of them."""
    if isinstance(value, str):
        if value.startswith(OPENING) or (prompt is None and looks_like_transcript(value)):
            return parse_transcript(value, at)
        if prompt is None:
            raise BadRow("missing_key", f"the row has no prompt, and {at} is neither messages nor a transcript")
    return as_turns(value, at, "assistant", source)


# ---- prompt ----


def _given_prompt(row: Mapping[str, Any], source: Source) -> Turns | None:
    key = next((key for key in PROMPT_KEYS if row.get(key) is not None), None)
    if key is None:
        return None
    value = row[key]
    if isinstance(value, str) and value.startswith(OPENING):
        return parse_transcript(value, key, asks=True)
    return as_turns(value, key, "user", source)


def _parted(prompt: Turns | None, answers: list[Turns]) -> tuple[Turns, list[Turns]]:
    """The prompt, and each answer without it.

    Answers that all start with another turn than an assistant's are whole dialogues: what they share, short of their
    last turn, is the prompt. A prompt given beside them must agree with it, at its start or at its end, and the longer
    of the two is taken.
    """
    if prompt is not None and any(turns[0].role == "assistant" for turns in answers):
        return prompt, answers
    most = min((len(turns) for turns in answers), default=1) - 1
    count = next((i for i in range(most) if any(turns[i] != answers[0][i] for turns in answers)), most)
    shared = answers[0][:count] if answers else ()
    if not shared:
        reason = "missing_key" if prompt is None else "bad_ranking"
        raise BadRow(reason, "the row has no prompt apart from its answers, and these share no first turn")
    if prompt is not None and not (_ends_with(shared, prompt) or _same(shared[: len(prompt)], prompt)):
        if not _ends_with(prompt, shared):
            raise BadRow("bad_ranking", "the answers are whole dialogues of another prompt than the row's")
        return prompt, [turns[count:] for turns in answers]
    return shared, [turns[count:] for turns in answers]


def _ends_with(turns: Turns, end: Turns) -> bool:
    return len(end) <= len(turns) and _same(turns[len(turns) - len(end) :], end)


def _same(one: Turns, other: Turns) -> bool:
    """Equal but for white space around the texts, as data sets that hold a prompt twice have it."""
    return [(m.role, m.content.strip()) for m in one] == [(m.role, m.content.strip()) for m in other]


# ---- order ----


def _numbers(values: Sequence[Any], at: str) -> list[float] | None:
    """Finite numbers, NaN for null; None where all are null. Text that is a number is one, as CSV files have it."""
    out = []
    for value in values:
        try:
            number = math.nan if value is None else math.inf if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.inf
        if value is not None and not math.isfinite(number):
            raise BadRow("bad_ranking", f"{at} holds a value that is neither a finite number nor null")
        out.append(number)
    return None if all(map(math.isnan, out)) else out


def _ordered(
    ranks: list[float] | None, scores: list[float] | None, count: int
) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Ranks and scores that agree, NaN in the same places; ranks from scores are 1 + how many answers score higher.

    Raises:
        BadRow: fewer than two are ranked; a ranked answer has no score though another has; a better rank has the lower
            score.
    """
    if ranks is None and scores is not None:
        ranks = [math.nan if math.isnan(own) else 1.0 + sum(other > own for other in scores) for own in scores]
    ranked = [i for i, rank in enumerate(ranks or ()) if not math.isnan(rank)]
    if ranks is None or len(ranked) < 2:
        raise BadRow("bad_ranking", f"{len(ranked)} of {count} answers are ranked; expected at least two")
    if scores is not None:
        if any(math.isnan(scores[i]) for i in ranked):
            raise BadRow("bad_ranking", "some ranked answers have a score and others none")
        if any(ranks[i] < ranks[j] and scores[i] < scores[j] for i, j in permutations(ranked, 2)):
            raise BadRow("bad_ranking", "an answer with the better rank has the lower score")
        scores = [score if i in ranked else math.nan for i, score in enumerate(scores)]
    return tuple(ranks), None if scores is None else tuple(scores)
