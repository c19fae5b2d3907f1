"""Names in unit tests: which are under test, and which the tests bring themselves."""

from __future__ import annotations

import ast
import builtins


class ConversionError(ValueError):
    """A test that cannot be split."""


def calls_one_of(node: ast.AST, functions: set[str]) -> bool:
    """Whether an expression is a call of one of some functions, by its plain name."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions


def called(module: ast.Module, helpers: set[str]) -> set[str]:
    """The functions that assertions call and that neither Python nor the tests' own code gives."""
    asserts = [node for node in ast.walk(module) if isinstance(node, ast.Assert)]
    names = {
        part.func.id
        for node in asserts
        for part in ast.walk(node.test)
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
    }
    found = {name for name in names if name not in helpers and not hasattr(builtins, name)}
    if not found:  # the function under test has the name of a builtin, as in `sum(10, 15) == 6`
        lefts = [node.test.left for node in asserts if isinstance(node.test, ast.Compare)]
        found = {left.func.id for left in lefts if isinstance(left, ast.Call) and isinstance(left.func, ast.Name)}
    return found - helpers


def defined(module: ast.Module) -> set[str]:
    """Functions and classes that a module defines, at any depth."""
    return {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def imported(module: ast.Module) -> set[str]:
    """Names that a module's imports bind."""
    imports = [node for node in ast.walk(module) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(name.asname or name.name).partition(".")[0] for node in imports for name in node.names}


def names_of(setup: str) -> set[str]:
    """What a setup defines or imports. Raises ``ConversionError`` where it is no Python."""
    try:
        module = ast.parse(setup)
    except (SyntaxError, ValueError) as mistake:
        raise ConversionError(f"the tests' setup is no Python: {mistake}") from None
    return defined(module) | imported(module)


def checked_function(node: ast.stmt) -> str | None:
    """The function that a line ``check(function)`` names."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "check":
        return ast.unparse(node.value.args[0]) if len(node.value.args) == 1 else None
    return None
