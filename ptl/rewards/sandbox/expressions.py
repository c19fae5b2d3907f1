"""The trusted side's own reading of a test's expression, over values that a hostile program chose.

Nothing is executed: a small set of Python expressions is walked. Equality is strict where Python's is not: True is
not 1, and NaN equals nothing. An integer equals a float of the same value, as the authors of tests rely on.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

LARGEST_BITS, LONGEST = 1 << 20, 100_000
"""Bits of a power of integers, and elements of a repeated sequence or a range, that are too many for a test."""

FUNCTIONS: dict[str, Callable] = {
    function.__name__: function
    for function in (abs, all, any, bool, complex, dict, float, frozenset, int, len, list, max, min, range, round, set)
} | {function.__name__: function for function in (sorted, str, sum, tuple)}
MATHS = ("ceil", "e", "fabs", "floor", "inf", "isclose", "isinf", "isnan", "nan", "pi", "sqrt")
NAMED = {f"math.{name}": getattr(math, name) for name in MATHS}
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Not: operator.not_, ast.Invert: operator.invert,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


class UnsupportedError(ValueError):
    """An expression that this side does not read."""


def same(left: object, right: object) -> bool:
    """Strict equality of plain values."""
    return _shape(left) == _shape(right)


def _shape(value: object) -> tuple:
    """Something whose ``==`` is strict."""
    kind = type(value)
    if kind in (int, float, complex):
        return ("n", value)
    if kind in (list, tuple, range):
        return (kind.__name__, *map(_shape, value))  # type: ignore[call-overload]
    if kind in (set, frozenset):
        return ("set", frozenset(map(_shape, value)))  # type: ignore[call-overload]
    if kind is dict:
        return ("dict", frozenset((_shape(key), _shape(item)) for key, item in value.items()))  # type: ignore[attr-defined]
    if value is None or kind in (bool, str, bytes):
        return (kind.__name__, value)
    raise UnsupportedError(f"a {kind.__name__} cannot be compared")


def evaluate(node: ast.expr, values: Mapping[str, object]) -> object:
    """The value of an expression. Raises ``UnsupportedError``, or what the operation itself raises."""
    reader = _READERS.get(type(node))
    if reader is None:
        raise UnsupportedError(f"{ast.unparse(node)[:80]} is not read on this side")
    return reader(node, values)


def _call(node: ast.Call, values: Mapping[str, object]) -> object:
    name = ast.unparse(node.func)
    function = FUNCTIONS.get(name) or NAMED.get(name)
    if not callable(function):
        raise UnsupportedError(f"{name}() is not read on this side")
    arguments = [evaluate(argument, values) for argument in node.args]
    options = {word.arg: evaluate(word.value, values) for word in node.keywords if word.arg}
    if len(options) < len(node.keywords) or "key" in options:
        raise UnsupportedError(f"the keywords of {name}() are not read on this side")
    result = function(*arguments, **options)
    if type(result) is range and len(result) > LONGEST:
        raise UnsupportedError("a range that long")
    return result


def _name(node: ast.Name, values: Mapping[str, object]) -> object:
    if node.id not in values:
        raise UnsupportedError(f"{node.id} is not known on this side")
    return values[node.id]


def _attribute(node: ast.Attribute, values: Mapping[str, object]) -> object:
    number = NAMED.get(ast.unparse(node))
    if not isinstance(number, float):
        raise UnsupportedError(f"{ast.unparse(node)} is not read on this side")
    return number


def _binary(node: ast.BinOp, values: Mapping[str, object]) -> object:
    left, right = evaluate(node.left, values), evaluate(node.right, values)
    if isinstance(node.op, ast.Mod) and not isinstance(left, int | float):
        raise UnsupportedError("formatting is not read on this side")
    if isinstance(node.op, ast.Mult | ast.Pow):
        return _product(node.op, left, right)
    if type(node.op) not in OPERATORS:
        raise UnsupportedError(f"{ast.unparse(node)[:80]} is not read on this side")
    return OPERATORS[type(node.op)](left, right)


def _product(op: ast.operator, left: object, right: object) -> object:
    """A product or a power, with a bound on its size."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        bits = left.bit_length() if isinstance(left, int) else 64
        if isinstance(op, ast.Mult):
            return left * right
        if isinstance(right, int) and bits * abs(right) > LARGEST_BITS:
            raise UnsupportedError("a power that large")
        return left**right
    for sequence, times in ((left, right), (right, left)):
        if isinstance(op, ast.Mult) and isinstance(sequence, str | list | tuple) and type(times) is int:
            if len(sequence) * times > LONGEST:
                raise UnsupportedError("a sequence that long")
            return sequence * times
    raise UnsupportedError("a product of these")


def _compare(node: ast.Compare, values: Mapping[str, object]) -> bool:
    left = evaluate(node.left, values)
    for op, other in zip(node.ops, node.comparators):
        right = evaluate(other, values)
        if not _holds(op, left, right):
            return False
        left = right
    return True


def _holds(op: ast.cmpop, left: object, right: object) -> bool:
    if isinstance(op, ast.Eq | ast.NotEq):
        return same(left, right) == isinstance(op, ast.Eq)
    if isinstance(op, ast.Is | ast.IsNot):
        if right is not None and type(right) is not bool:
            raise UnsupportedError("`is` with anything but None, True and False")
        return (left is right) == isinstance(op, ast.Is)
    if isinstance(op, ast.In | ast.NotIn):
        if type(right) in (str, bytes):
            found = left in right  # type: ignore[operator]
        else:
            found = any(same(left, item) for item in right)  # type: ignore[attr-defined]
        return found == isinstance(op, ast.In)
    return OPERATORS[type(op)](left, right)


def _boolean(node: ast.BoolOp, values: Mapping[str, object]) -> object:
    value: object = None
    for part in node.values:
        value = evaluate(part, values)
        if bool(value) == isinstance(node.op, ast.Or):
            break
    return value


def _subscript(node: ast.Subscript, values: Mapping[str, object]) -> object:
    holder = evaluate(node.value, values)
    if isinstance(node.slice, ast.Slice):
        parts = (node.slice.lower, node.slice.upper, node.slice.step)
        return holder[slice(*(None if part is None else evaluate(part, values) for part in parts))]  # type: ignore[index]
    return holder[evaluate(node.slice, values)]  # type: ignore[index]


def _dict(node: ast.Dict, values: Mapping[str, object]) -> dict:
    if None in node.keys:
        raise UnsupportedError("** in a dict")
    return {evaluate(key, values): evaluate(item, values) for key, item in zip(node.keys, node.values) if key}


_READERS: dict[type, Callable] = {
    ast.Constant: lambda node, values: node.value,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.List: lambda node, values: [evaluate(item, values) for item in node.elts],
    ast.Tuple: lambda node, values: tuple(evaluate(item, values) for item in node.elts),
    ast.Set: lambda node, values: {evaluate(item, values) for item in node.elts},
    ast.Dict: _dict,
    ast.UnaryOp: lambda node, values: OPERATORS[type(node.op)](evaluate(node.operand, values)),
    ast.BinOp: _binary,
    ast.BoolOp: _boolean,
    ast.Compare: _compare,
    ast.IfExp: lambda node, values: evaluate(node.body if evaluate(node.test, values) else node.orelse, values),
    ast.Subscript: _subscript,
    ast.Call: _call,
}


def check_readable(node: ast.expr, known: set[str]) -> None:
    """Raises ``UnsupportedError`` where a part of an expression is not read here, whatever ``known`` names hold."""
    for part in ast.walk(node):
        if not isinstance(part, ast.expr) or isinstance(part, ast.Slice):
            continue
        text = ast.unparse(part)[:80]
        if isinstance(part, ast.Name):
            readable = part.id in known or part.id in FUNCTIONS or part.id == "math"
        elif isinstance(part, ast.Attribute):
            readable = text in NAMED
        elif isinstance(part, ast.Call):
            readable = isinstance(part.func, ast.Attribute) or ast.unparse(part.func) in FUNCTIONS
        elif isinstance(part, ast.BinOp):
            formats = (
                isinstance(part.op, ast.Mod) and isinstance(part.left, ast.Constant) and type(part.left.value) is str
            )
            readable = type(part.op) in (*OPERATORS, ast.Mult, ast.Pow) and not formats
        else:
            readable = type(part) in _READERS
        if not readable:
            raise UnsupportedError(f"`{text}` is not read outside of the sandbox")
