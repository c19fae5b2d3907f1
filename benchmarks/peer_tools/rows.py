"""Real conversations of a chosen length, the same for both sides of a comparison."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_rows(paths: Sequence[Path], columns: tuple[str, str] | None = None) -> list[Row]:
    """Conversations ``{"messages": [{"role", "content"}, ...]}`` of JSONL files.

    Arguments:
        paths: files whose rows have ``messages``, or the two ``columns``.
        columns: names of the user's and the assistant's text where a row has no ``messages``.

    Raises:
        ValueError: a row has neither, with its file and line.
    """
    rows = []
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_conversation(json.loads(line), columns, f"{path}:{number}"))
    return rows


def _conversation(row: Row, columns: tuple[str, str] | None, where: str) -> Row:
    if "messages" in row:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
    if columns is not None and all(name in row for name in columns):
        return {"messages": [{"role": r, "content": row[c]} for r, c in zip(("user", "assistant"), columns)]}
    names = ", ".join(sorted(row))
    raise ValueError(f"{where}: expected 'messages', got the columns {names}: name two of them with --columns")


def choose_rows(
    rows: Iterable[Row], tokenizer: Any, *, count: int, tokens: tuple[int, int], seed: int
) -> tuple[list[Row], list[int]]:
    """``count`` conversations in a random order, and their lengths in tokens.

    A conversation is kept when it ends with the assistant and has between ``tokens[0]`` and ``tokens[1]`` tokens in
    the tokenizer's chat template. The order is a function of ``seed``.

    Raises:
        ValueError: fewer than ``count`` are left.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    chosen, lengths = [], []
    for row in shuffled:
        if len(chosen) == count:
            break
        if row["messages"][-1]["role"] != "assistant":
            continue
        length = len(tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False))
        if tokens[0] <= length <= tokens[1]:
            chosen.append(row)
            lengths.append(length)
    if len(chosen) < count:
        raise ValueError(
            f"{len(chosen)} of {len(shuffled)} conversations have {tokens[0]} to {tokens[1]} tokens, {count} are "
            "needed: give more files with --rows, fewer --steps, or another range with --tokens"
        )
    return chosen, lengths


def join_rows(rows: Iterable[Row], tokenizer: Any, *, tokens: tuple[int, int], seed: int) -> list[Row]:
    """Conversations of several turns, made by putting one after the other while ``tokens[1]`` has room for them.

    A row that is longer by itself stays alone, and the last may stay short: ``choose_rows`` leaves both out.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    joined: list[Row] = []
    held: list[dict[str, str]] = []
    for row in shuffled:
        longer = [*held, *row["messages"]]
        length = len(tokenizer.apply_chat_template(longer, tokenize=True, return_dict=False))
        if held and length > tokens[1]:
            joined.append({"messages": held})
            longer = row["messages"]
        held = longer
    return [*joined, {"messages": held}] if held else joined


def write_rows(path: Path, rows: Sequence[Row]) -> str:
    """Writes a JSONL file and returns the first 16 hex digits of its sha256."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
