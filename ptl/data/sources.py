"""Where rows come from: the ``Source`` a user writes, the formats of its rows, and how a format is told from the rows.

Nothing heavy is imported here, so that ``ptl --help`` and the config parser may load the dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ptl.types import Conversation, Prompt, Ranking, Record

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "ranking", "prompt"]
FORMATS: tuple[str, ...] = tuple(name for name in get_args(Format) if name != "auto")
RECORD_OF: Mapping[str, type[Record]] = {
    **dict.fromkeys(("messages", "sharegpt", "alpaca", "prompt_completion", "text"), Conversation),
    "ranking": Ranking,
    "prompt": Prompt,
}
"""Which record each format makes."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "tools", "system"),
    "sharegpt": ("conversations", "tools", "system"),
    "alpaca": ("instruction", "input", "output", "history", "system"),
    "prompt_completion": ("prompt", "completion", "tools", "system"),
    "text": ("text",),
    "ranking": (
        *("prompt", "instruction", "completions", "responses", "ranks", "scores"),
        *("chosen", "rejected", "margin", "score_chosen", "score_rejected"),
        *("annotator", "status", "tools", "system"),
    ),
    "prompt": ("prompt", "answer", "tests", "tools", "system", "pass_rate"),
}
"""The fields each format reads; what ``Source.columns`` may rename."""

REASONS: Mapping[str, str] = {
    "broken_json": "the line is not one JSON value",
    "not_an_object": "the row is not a JSON object",
    "wrong_encoding": "the text is not UTF-8",
    "wrong_columns": "a CSV row has more or fewer cells than the header",
    "broken_csv": "the CSV row breaks the quoting rules",
    "missing_key": "a key that the format needs is absent",
    "wrong_type": "a value has another type than the format needs",
    "unknown_role": "a message has a role that is not mapped",
    "null_content": "a message has no content",
    "empty_content": "a user or assistant message is blank",
    "not_text": "a content part is not text",
    "empty_conversation": "the row has no message",
    "no_assistant": "the row has no assistant turn, so nothing to learn from",
    "bad_tool_call": "a tool call has no name, or arguments that are not a JSON object",
    "bad_tools": "the tools are not a list of JSON schemas",
    "bad_weight": "train or weight is not a boolean or a finite number >= 0",
    "bad_ranking": "fewer than two answers are ranked, or ranks and scores are not finite or contradict each other",
    "bad_transcript": "a transcript does not alternate between Human and Assistant, from Human on",
    "revised": "a ranking was revised, and the file is not settled (`ptl rank settle`)",
    "not_ranked": "a person skipped or flagged the row instead of ranking it; it is left out",
    "superseded": "the same person ranked the answers anew later; the row is left out",
    "no_question": "a prompt ends with an assistant turn, or has no turn",
    "pass_rate": "the row's pass_rate lies outside of the source's; the row is left out",
    "not_made": "reasoning-gym failed to make the row",
}
"""Stable names of why a row is refused or left out. The renderer adds its own (``RenderError.reason``)."""


class BadRow(ValueError):  # noqa: N818  (it is a verdict on a row, not a failure of the program)
    """A row that is refused.

    Attributes:
        reason: a key of ``REASONS``, the name it is counted under.
        detail: what was got and expected, without an excerpt of the row's text.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class LeftOut(BadRow):
    """A row that says itself that nobody is to learn from it: counted as dropped, not as refused."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set of a mixture.

    Attributes:
        path: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file, any of these with ``.gz``; a folder of
            such files (all levels, in order of their paths); ``zip://inner/path::outer.zip``; a hub name
            ``owner/name``, with ``owner/name:config`` for a configuration; or ``gym://NAME?size=2000&seed=0``, rows
            that reasoning-gym makes, with the parameters of its data set.
        format: what a row looks like; ``auto`` tells it from the first rows.
        name: label in the audit and in metrics; the path where absent.
        weight: share of this source in a mixture, relative to the other sources; > 0. Does not change the tokens.
        split: split of a hub data set.
        columns: ``{field of the format: column of the data}``, for data that names its columns otherwise.
        roles: ``{role in the data: one of ptl.types.ROLES}``, beside the names that are known.
        limit: read the first ``limit`` rows only; the others are counted.
        pass_rate: ``[low, high]``, both in [0, 1]: rows whose column ``pass_rate`` lies outside are left out, those
            without one refused.
    """

    path: str
    format: Format = "auto"
    name: str | None = None
    weight: float = 1.0
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    pass_rate: list[float] | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("source: path is empty; expected a file, a folder, a hub name, zip:// or gym://")
        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(f"source {self.path}: format is {self.format!r}; expected auto or one of {list(FORMATS)}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"source {self.path}: weight is {self.weight}; expected a finite number > 0")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"source {self.path}: limit is {self.limit}; expected an integer >= 1 or null")
        if self.pass_rate is not None and not (
            len(self.pass_rate) == 2 and 0.0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1.0
        ):
            raise ValueError(
                f"source {self.path}: pass_rate is {self.pass_rate}; expected [low, high] with 0 <= low <= high <= 1"
            )
        known = {name for names in FIELDS.values() for name in names}
        if unknown := sorted(set(self.columns) - known):
            raise ValueError(
                f"source {self.path}: columns renames {unknown}, which no format reads; expected "
                f"{{field: column of the data}} with fields among {sorted(known)}"
            )

    @property
    def label(self) -> str:
        """The name shown for this source."""
        return self.name or self.path


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row under the format's own field names: ``columns`` maps field -> column of the data.

    The columns that were renamed away are not visible under their old name, so that a row with both ``question`` and
    ``prompt`` can be read by its ``question`` alone.
    """
    if not columns:
        return row
    taken = set(columns.values())
    out = {key: value for key, value in row.items() if key not in taken and key not in columns}
    out.update({name: row[column] for name, column in columns.items() if column in row})
    return out


_JUDGED = frozenset({"answer", "tests", "test_list", "test", "ground_truth", "gym"})


def format_of(row: Mapping[str, Any]) -> str | None:
    """The format one row looks like, or None. The most specific keys win."""
    keys = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= keys or _lists_answers(row, keys):
        return "ranking"
    if "conversations" in keys or "conversation" in keys:
        return "sharegpt"
    if "messages" in keys:
        return "sharegpt" if _first_message_keys(row["messages"]) >= {"from", "value"} else "messages"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if keys & {"prompt", "question", "problem"} and keys & _JUDGED:
        return "prompt"
    if "text" in keys:
        return "prompt" if "test_list" in keys else "text"
    return "prompt" if "prompt" in keys else None


def _lists_answers(row: Mapping[str, Any], keys: set[str]) -> bool:
    """Whether the row has a list of answers with ranks or scores, or of answers that are objects and no messages."""
    lists = keys & {"completions", "responses"}
    wanted = {"messages", "response", "answer"}
    return bool(lists) and bool(
        keys & {"ranks", "scores"} or any(_first_message_keys(row[name]) & wanted for name in lists)
    )


def _first_message_keys(messages: object) -> set[str]:
    if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
        return set(messages[0])
    return set()


def detect_format(source: Source, rows: Iterable[Mapping[str, Any]]) -> str:
    """The format of a source: the one it names, else what most of its first rows look like.

    The others are then read as that format and refused one by one, each with its reason.

    Args:
        source: the source; its ``columns`` are applied first.
        rows: its first readable rows.

    Raises:
        ValueError: no row looks like a known format, or none of several is that of most rows.
    """
    if source.format != "auto":
        return source.format
    seen: dict[str, int] = {}
    keys: list[str] = []
    for row in rows:
        name = format_of(renamed(row, source.columns))
        keys = keys or sorted(map(str, row))
        if name is not None:
            seen[name] = seen.get(name, 0) + 1
    if seen and 2 * max(seen.values()) > sum(seen.values()):
        return max(seen, key=lambda name: seen[name])
    hint = f"set `format` of the source to one of {list(FORMATS)}"
    if seen:
        raise ValueError(f"source {source.path}: its first rows look like several formats {seen}; {hint}")
    raise ValueError(
        f"source {source.path}: no format fits the first rows, whose keys are {keys[:20]}; {hint}, and `columns` to "
        "{field of the format: column of the data} where the columns have other names"
    )


def check_record(source: Source, row_format: str, expected: type) -> None:
    """Refuses a source whose rows are another record than the objective eats.

    Raises:
        ValueError: with the keys to set.
    """
    made = RECORD_OF[row_format]
    if made is expected:
        return
    fitting = [name for name, record in RECORD_OF.items() if record is expected]
    hint = ""
    if row_format == "prompt" and expected is Conversation:
        hint = ", for example `format: prompt_completion, columns: {prompt: question, completion: answer}`"
    raise ValueError(
        f"source {source.path}: its rows are of format {row_format!r} ({made.__name__} records), but this objective "
        f"learns from {expected.__name__} records; set `format` to one of {fitting} and `columns` to match{hint}"
    )
