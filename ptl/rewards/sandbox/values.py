"""Results as they arrive: bytes that a hostile program may have written. Nothing here trusts them.

The format is that of ``inside/encode.py``. What does not fit it exactly is no result; it never raises further up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from ptl.rewards.sandbox.results import CallResult

DEEPEST = 110
INTEGER = re.compile(r"-?0x[0-9a-f]+")
FLOAT = re.compile(r"-?(0x[01]\.[0-9a-f]+p[+-]\d{1,4}|inf)|nan")
LONGEST_MESSAGE = 500


class MalformedError(ValueError):
    """Bytes that are not a result."""


def decode(data: object, depth: int = 0) -> object:
    """A value from its JSON. Raises ``MalformedError``."""
    if depth > DEEPEST:
        raise MalformedError("nested too deeply")
    if data is None or type(data) in (bool, str):
        return data
    if type(data) is not list or not data or type(data[0]) is not str:
        raise MalformedError("not a tagged list")
    tag, rest = data[0], data[1:]
    if tag in ("l", "t", "s", "z"):
        items = [decode(item, depth + 1) for item in rest]
        return items if tag == "l" else tuple(items) if tag == "t" else _hashed(tag, items)
    if tag == "d":
        if any(type(pair) is not list or len(pair) != 2 for pair in rest):
            raise MalformedError("not pairs")
        keys = [decode(pair[0], depth + 1) for pair in rest]
        _hashed("s", keys)
        return dict(zip(keys, [decode(pair[1], depth + 1) for pair in rest]))
    if any(type(part) is not str for part in rest):
        raise MalformedError("not text")
    return _scalar(tag, rest)


def _scalar(tag: str, rest: list[str]) -> object:
    if tag == "i" and len(rest) == 1 and INTEGER.fullmatch(rest[0]):
        return int(rest[0], 16)
    if tag in ("f", "c") and len(rest) == (1 if tag == "f" else 2) and all(map(FLOAT.fullmatch, rest)):
        numbers = [float.fromhex(part) for part in rest]
        return numbers[0] if tag == "f" else complex(*numbers)
    if tag == "b" and len(rest) == 1:
        return bytes.fromhex(rest[0])
    raise MalformedError("an unknown type")


def _hashed(tag: str, items: list) -> set | frozenset:
    """A set; refused where many items share a hash, which would take quadratic time."""
    if len(items) > 1000 and len(set(map(hash, items))) < len(items) // 2:
        raise MalformedError("items chosen to collide")
    return set(items) if tag == "s" else frozenset(items)


def _no_numbers(text: str) -> object:
    raise MalformedError("a bare number")


def _parse(line: bytes) -> tuple[int, CallResult] | None:
    try:
        index, kind, payload = json.loads(line.decode("utf-8"), parse_float=_no_numbers, parse_constant=_no_numbers)
        if type(index) is not int or kind not in ("value", "error"):
            return None
        if kind == "value":
            return index, CallResult(decode(payload))
        text = payload[:LONGEST_MESSAGE] if type(payload) is str else "?"
        return index, CallResult(error=text.encode("utf-8", "replace").decode("utf-8") or "?")
    except (ValueError, TypeError, RecursionError, OverflowError):
        return None


def read(lines: Sequence[bytes], count: int) -> tuple[str | None, dict[int, CallResult]]:
    """The error of the program, if it has one, and the results by call; of several lines the first counts."""
    failure: str | None = None
    found: dict[int, CallResult] = {}
    for line in lines:
        parsed = _parse(line) if line else None
        if parsed is None:
            continue
        index, result = parsed
        if index == -1 and failure is None and not found:
            failure = result.error
        elif 0 <= index < count:
            found.setdefault(index, result)
    return failure, found
