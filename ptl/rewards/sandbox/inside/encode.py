"""What a function returned, as JSON of exact builtin types. The other side is ``ptl.rewards.sandbox.values``.

None, booleans and strings are JSON's own; all else is a list whose first element names the type: ``["i", "0x2a"]``,
``["f", "0x1.8p+1"]``, ``["t", ...]`` for a tuple, ``["d", [key, value], ...]`` for a dict. Numbers travel as
hexadecimal text, which is exact and takes linear time whatever their length.
"""

from __future__ import annotations

import collections
import json

DEEPEST = 100
SEQUENCES = {list: "l", tuple: "t", set: "s", frozenset: "z"}
DICTS = (dict, collections.Counter, collections.defaultdict, collections.OrderedDict)
"""The standard library's own dicts count as dicts, since their equality is that of a dict; no other subclass does."""


def plain(value: object, depth: int = 0) -> object:
    """``value`` as JSON writes it. Raises ``TypeError`` for what is of no exact builtin type, or nested too deeply."""
    if depth > DEEPEST:
        raise TypeError(f"the value is nested more than {DEEPEST} deep")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return ["i", hex(value)]  # type: ignore[arg-type]
    if kind is float:
        return ["f", value.hex()]  # type: ignore[attr-defined]
    if kind is complex:
        return ["c", value.real.hex(), value.imag.hex()]  # type: ignore[attr-defined]
    if kind is bytes:
        return ["b", value.hex()]  # type: ignore[attr-defined]
    if kind in SEQUENCES:
        return [SEQUENCES[kind], *(plain(item, depth + 1) for item in value)]  # type: ignore[attr-defined]
    if kind in DICTS:
        pairs = dict.items(value)  # type: ignore[arg-type]
        return ["d", *([plain(key, depth + 1), plain(item, depth + 1)] for key, item in pairs)]
    raise TypeError(
        f"expected a plain value (None, bool, int, float, str, list, tuple, dict, set, ...), got {kind.__name__}"
    )


def line(index: int, kind: str, payload: object) -> bytes:
    """One line of the protocol: the number of the call, ``value`` or ``error``, and what it is."""
    return json.dumps([index, kind, payload]).encode("ascii") + b"\n"
