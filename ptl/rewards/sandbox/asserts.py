"""Unit tests, split in two: what the program is asked, and what is expected of its answers.

``assert f([1, 2]) == 3`` becomes the call ``f([1, 2])``, which goes into the sandbox, and the verdict ``answer == 3``,
which stays here. HumanEval's ``check(candidate)``, variables that hold constants and loops over constants are read too.
What cannot be split stays code that would run inside, with what it expects; a program can cheat there, so it is kept
apart as weak.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ptl.rewards.sandbox.expressions import check_readable, evaluate
from ptl.rewards.sandbox.names import (
    ConversionError,
    called,
    calls_one_of,
    checked_function,
    defined,
    imported,
    names_of,
)
from ptl.rewards.sandbox.results import CallResult, RunResult

WRAPPERS = ("bool", "dict", "frozenset", "list", "set", "sorted", "tuple")
"""Functions that may stand around a call and go inside with it, so that it may return an iterator."""
MOST_TURNS = 1000
ANSWER = "answer_"


@dataclass(frozen=True)
class Check:
    """One assertion.

    Attributes:
        source: as it was written.
        calls: expressions that the program is asked for.
        verdict: what must be true of the answers, which it names ``answer_0``, ``answer_1``, ...
    """

    source: str
    calls: tuple[str, ...]
    verdict: ast.expr

    def holds(self, answers: Sequence[CallResult]) -> bool:
        """Whether the answers pass. Nothing that a program answers makes it raise."""
        if not all(answer.ok for answer in answers):
            return False
        values = {f"{ANSWER}{i}": answer.value for i, answer in enumerate(answers)}
        try:
            return bool(evaluate(self.verdict, values))
        except Exception:  # an answer of another kind than the test's arithmetic expects, or too large for it
            return False


@dataclass(frozen=True)
class UnitTests:
    """The unit tests of a task.

    Attributes:
        setup: code that runs inside before the program's: imports, classes. It holds nothing that is expected.
        checks: assertions whose expected values stay outside.
        weak: the tests as they were, where a part of them could not be split: they would run inside with what they
            expect, and count as one test.
        reason: why, where there is a weak test.
    """

    setup: str = ""
    checks: tuple[Check, ...] = ()
    weak: str = ""
    reason: str = ""

    def calls(self, *, weak: bool = False) -> tuple[str, ...]:
        """What the program is asked, in order; with ``weak`` the weak test is run as well."""
        asked = tuple(call for check in self.checks for call in check.calls)
        return (*asked, self.weak) if weak and self.weak else asked

    def passed(self, result: RunResult, *, weak: bool = False) -> list[bool]:
        """Whether each check, and with ``weak`` the weak test, passed, from the results of ``calls``."""
        verdicts, place = [], 0
        for check in self.checks:
            verdicts.append(check.holds(result.calls[place : place + len(check.calls)]))
            place += len(check.calls)
        if weak and self.weak:
            verdicts.append(result.calls[place].ok)
        return verdicts


def convert(source: str | Sequence[str], entry_point: str | None = None, setup: str = "") -> UnitTests:
    """Reads unit tests.

    Args:
        source: assertions, or a module that defines ``check(candidate)``; a list is read as one after the other.
        entry_point: name of the function under test; None takes the names that the assertions call.
        setup: code that the tests need, run inside.

    Raises ``ConversionError`` where the source is no Python.
    """
    pieces = [source] if isinstance(source, str) else list(source)
    try:
        module = ast.parse("\n".join(pieces))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as mistake:
        raise ConversionError(f"the tests are no Python: {mistake}") from None
    return _Reader(module, entry_point, setup).read()


@dataclass
class _Reader:
    module: ast.Module
    entry_point: str | None
    setup: str
    checks: list[Check] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        body = self.module.body
        self.check = next(
            (n for n in body if isinstance(n, ast.FunctionDef) and n.name == "check" and n.args.args), None
        )
        self.entry_point = self.entry_point or next(filter(None, map(checked_function, body)), None)
        self.imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        self.hidden = defined(self.module)
        """Names whose values only the tests' own code knows."""
        helpers = self.hidden | imported(self.module) | names_of(self.setup)
        self.functions = {self.entry_point} if self.entry_point else called(self.module, helpers)

    def read(self) -> UnitTests:
        constants: dict[str, ast.expr] = {}
        self._statements([node for node in self.module.body if not checked_function(node)], constants)
        call = ""
        if self.check is not None:
            if not self.entry_point:
                raise ConversionError("check(candidate) needs the name of the function under test: entry_point")
            constants[self.check.args.args[0].arg] = ast.Name(self.entry_point, ast.Load())
            self._statements(self.check.body, constants)
            call = "" if any(map(checked_function, self.module.body)) else f"\ncheck({self.entry_point})"
        setup = "\n".join([self.setup, *map(ast.unparse, self.imports)]).strip()
        weak = ast.unparse(self.module) + call if self.reasons else ""
        return UnitTests(setup, tuple(self.checks), weak, next(iter(self.reasons), ""))

    def _statements(self, body: Sequence[ast.stmt], constants: dict[str, ast.expr]) -> None:
        for node in body:
            done = len(self.checks)
            try:
                self._statement(node, constants)
            except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as reason:
                del self.checks[done:]
                self._hide(node, constants)
                self.reasons.append(str(reason))

    def _statement(self, node: ast.stmt, constants: dict[str, ast.expr]) -> None:
        if isinstance(node, ast.Assert):
            self._assertion(node, constants)
        elif isinstance(node, ast.For) and not node.orelse:
            self._loop(node, constants)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, self._filled(node.value, constants)
            if not calls_one_of(value, self.functions):
                value = ast.parse(repr(self._constant(value, {})), mode="eval").body
            constants[name] = value  # an answer under a name is asked for where the name is used
            self.hidden.discard(name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if node not in self.imports:
                self.imports.append(node)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.hidden.add(node.name)
        elif not isinstance(node, ast.Pass) and not _is_text(node):
            raise ConversionError(f"`{ast.unparse(node).splitlines()[0][:80]}` is no assertion")

    def _loop(self, node: ast.For, constants: dict[str, ast.expr]) -> None:
        turns = self._constant(node.iter, constants)
        if not isinstance(turns, list | tuple | range | str) or len(turns) > MOST_TURNS:
            raise ConversionError("a loop over something else than a short constant sequence")
        several = isinstance(node.target, ast.Tuple | ast.List)
        names = node.target.elts if isinstance(node.target, ast.Tuple | ast.List) else [node.target]
        for turn in turns:
            values = turn if several else [turn]
            if not isinstance(values, list | tuple) or len(values) != len(names):
                raise ConversionError("a loop whose items do not fit its names")
            for name, value in zip(names, values):
                if not isinstance(name, ast.Name):
                    raise ConversionError("a loop over names inside names")
                constants[name.id] = ast.parse(repr(value), mode="eval").body
            for inner in node.body:
                self._statement(inner, constants)

    def _constant(self, node: ast.expr, constants: dict[str, ast.expr]) -> object:
        filled = self._filled(node, constants)
        check_readable(filled, set())
        value = evaluate(filled, {})
        if not isinstance(value, range) and not _is_literal(value):
            raise ConversionError(f"`{ast.unparse(node)[:80]}` has no literal")
        return value

    def _assertion(self, node: ast.Assert, constants: dict[str, ast.expr]) -> None:
        splitter = _Splitter(self.functions, self.hidden - set(constants))
        test = _asked_if_true(self._filled(node.test, constants), self.functions)
        verdict = splitter.visit(test)
        check_readable(verdict, {f"{ANSWER}{i}" for i in range(len(splitter.calls))})
        if not splitter.calls:
            if not evaluate(verdict, {}):
                raise ConversionError(f"`{ast.unparse(node)[:80]}` is false whatever the program does")
            return  # `assert True`
        self.checks.append(Check(ast.unparse(node), tuple(splitter.calls), verdict))

    def _filled(self, node: ast.expr, constants: Mapping[str, ast.expr]) -> ast.expr:
        bound = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        bound |= {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
        if bound & set(constants):
            raise ConversionError(f"{sorted(bound & set(constants))[0]} has two meanings")
        return _Fill(constants).visit(copy.deepcopy(node))

    def _hide(self, node: ast.stmt, constants: dict[str, ast.expr]) -> None:
        """After a statement that was not followed, the names that it may have changed are not known any more."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and (isinstance(part.ctx, ast.Store) or _mutable(constants.get(part.id))):
                self.hidden.add(part.id)
                constants.pop(part.id, None)


class _Fill(ast.NodeTransformer):
    """Puts constants in the place of names."""

    def __init__(self, constants: Mapping[str, ast.expr]) -> None:
        self.constants = constants

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.constants[node.id]) if node.id in self.constants else node


class _Splitter(ast.NodeTransformer):
    """Takes the calls of the functions under test out of an expression, and leaves a name for the answer of each."""

    def __init__(self, functions: set[str], hidden: set[str]) -> None:
        self.functions, self.hidden, self.calls = functions, hidden, []

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if not self._goes_inside(node):
            return self.generic_visit(node)  # type: ignore[return-value]
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if names & self.hidden:
            raise ConversionError(f"{sorted(names & self.hidden)[0]} is known to the tests only")
        inner = [part for part in ast.walk(node) if isinstance(part, ast.Call) and self._under_test(part)]
        if len({ast.unparse(part.func) for part in inner}) > 1:
            # One of them may be a helper that compares, and an expected value would go in with its arguments.
            raise ConversionError("calls of several functions inside each other")
        self.calls.append(ast.unparse(node))
        return ast.Name(f"{ANSWER}{len(self.calls) - 1}", ast.Load())

    def _under_test(self, node: ast.AST) -> bool:
        return calls_one_of(node, self.functions)

    def _goes_inside(self, node: ast.Call) -> bool:
        if self._under_test(node):
            return True
        alone = len(node.args) == 1 and not node.keywords and isinstance(node.func, ast.Name)
        return alone and node.func.id in WRAPPERS and self._under_test(node.args[0])  # type: ignore[attr-defined]


def _asked_if_true(test: ast.expr, functions: set[str]) -> ast.expr:
    """`f(x)` and `not f(x)` ask for a boolean: what `f` gives may be of any kind, as a match of a pattern is."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return ast.UnaryOp(test.op, _asked_if_true(test.operand, functions))
    return ast.Call(ast.Name("bool", ast.Load()), [test], []) if calls_one_of(test, functions) else test


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_literal(value: object) -> bool:
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _mutable(node: ast.expr | None) -> bool:
    return isinstance(node, ast.List | ast.Dict | ast.Set)
