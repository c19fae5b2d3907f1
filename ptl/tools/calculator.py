"""Arithmetic, exact where it can be, with bounded work."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Number = int | float | Fraction

LONGEST = 1000
"""Characters of an expression."""
_DIGITS = 4000
"""Bits of the largest exact number."""
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "atan")},
    **{"abs": abs, "round": round, "floor": math.floor, "ceil": math.ceil, "min": min, "max": max},
}
_NAMES = {"pi": math.pi, "e": math.e}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "\u00a0": "", "\u202f": ""})
_WORDS = {"plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/"}
_WORD = re.compile(r"\b(?:plus|minus|times|(?:multiplied|divided)\s+by)\b", re.IGNORECASE)
_X = re.compile(r"(?<=\d)(?<!(?<![\w.])0)x(?=\d)|(?<=[\d)%])\s+x\s+(?=[\d.(])", re.IGNORECASE)
"""An x that multiplies. ``2x - 3`` and ``2x(3)`` may be algebra, and ``0x10`` is a number."""
_UNDERSTOOD = (
    f"expected numbers, brackets, + - * / // % **, the words {', '.join(_WORDS)}, x between numbers, "
    f"{', '.join((*_FUNCTIONS, *_NAMES))}"
)


def calculate(expression: str) -> str:
    """The value of an arithmetic expression.

    ``+ - * / // % **``, brackets, ``sqrt exp log log2 log10 sin cos tan atan abs round floor ceil min max pi e``; also
    ``× ÷ − ^``, the words plus, minus, times, multiplied by and divided by, an x between numbers, a thousands comma,
    and ``%`` behind a number for a hundredth. A word binds as its sign does: 2 plus 3 times 4 is 14. Integers and
    fractions are exact.

    Raises:
        ValueError: it is none, or its value is too large.
    """
    text = expression.strip().rstrip("=")
    if len(text) > LONGEST:
        raise ValueError(f"an expression of {len(text)} characters; expected at most {LONGEST}")
    try:
        tree = ast.parse(_plain(_in_signs(text)), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression[:100]!r} is no arithmetic expression: {_UNDERSTOOD}") from None
    try:
        return _written(_value(tree.body))
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"{expression[:100]!r} has no value: {error}") from None


def _in_signs(text: str) -> str:
    """With Python's signs in place of other signs and of words."""
    text = _WORD.sub(lambda found: _WORDS[" ".join(found[0].lower().split())], text)
    return _X.sub("*", text).translate(_SIGNS)


def _plain(text: str) -> str:
    """Without thousands commas, and with ``7 %`` as a fraction where nothing follows that it could divide."""
    if not re.search(r"[a-z]\s*\(", text):  # there a comma parts arguments
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"(\d(?:[\d.]*))\s*%(?=\s*(?:$|[-+*/)]))", r"(\1/100)", text)


def _value(node: ast.AST) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        return _small(Fraction(str(node.value)))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return _small(node.value)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Div):
            return _small(left / right if float in (type(left), type(right)) else Fraction(left) / Fraction(right))
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _small(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if node.keywords:
            raise ValueError(f"{node.func.id} takes numbers alone")
        given = [_value(argument) for argument in node.args]
        if node.func.id == "round" and len(given) == 2:
            return _small(round(given[0], int(given[1])))
        return _small(_FUNCTIONS[node.func.id](*given))
    raise ValueError(f"{ast.unparse(node)[:100]!r} is no arithmetic: {_UNDERSTOOD}")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        exponent = int(exponent)
    if isinstance(exponent, int) and not isinstance(base, float):
        part = Fraction(base)
        bits = max(part.numerator.bit_length(), part.denominator.bit_length())
        if bits * abs(exponent) > _DIGITS:
            raise OverflowError("the number is too large")
        return _small(Fraction(base) ** exponent)
    value = float(base) ** float(exponent)
    if isinstance(value, complex):
        raise ValueError("it is no real number")
    return value


def _small(value: Number) -> Number:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise OverflowError("the number is too large")
        return value
    part = Fraction(value)
    if max(part.numerator.bit_length(), part.denominator.bit_length()) > _DIGITS:
        raise OverflowError("the number is too large")
    return int(part) if part.denominator == 1 else part


def _written(value: Number) -> str:
    """An integer, a decimal number where that is exact and short, else about 12 digits."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Fraction):
        rest = value.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1 and len(exact := _decimal(value)) <= 20:
            return exact
    return f"{float(value):.12g}"


def _decimal(value: Fraction) -> str:
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = str(abs(int(value * 10**places))).rjust(places + 1, "0")
    return ("-" if value < 0 else "") + digits[:-places] + "." + digits[-places:]
