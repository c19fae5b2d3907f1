"""Tools by name: those that come with ptl, and any Python function."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ptl.tools.base import Tool

READY = ("search=PATH", "python", "calculator", "clock")


def load_tools(names: Sequence[str]) -> tuple[Tool, ...]:
    """Tools by what a person wrote.

    Args:
        names: ``search=PATH`` for documents in a file or folder, ``python``, ``calculator``, ``clock``, or
            ``package.module:function``: a function with type hints and a docstring that describes each argument.

    Raises:
        ValueError: there is no such tool, or the function cannot be described.
    """
    return tuple(_load(name.strip()) for name in names)


def _load(name: str) -> Tool:
    kind, _, given = name.partition("=")
    if kind == "search":
        return _search(given)
    if ":" in name:
        return _function(name)
    for tool in _PLAIN:
        if tool.name == name:
            return tool
    raise ValueError(f"there is no tool {name!r}; expected one of {', '.join(READY)} or package.module:function")


def _text(name: str, description: str, *, required: bool = True) -> dict[str, Any]:
    """The schema of one text argument."""
    properties = {name: {"type": "string", "description": description}}
    return {"type": "object", "properties": properties, "required": [name] if required else []}


_PLAIN = (
    Tool(
        name="python",
        description="Runs a Python program and gives what it prints. It has no network and no files.",
        parameters=_text("code", "The program."),
        function="ptl.tools.python.run",
    ),
    Tool(
        name="calculator",
        description="Gives the value of an arithmetic expression.",
        parameters=_text("expression", "For example 12 * (3 + 4)."),
        function="ptl.tools.calculator.calculate",
    ),
    Tool(
        name="clock",
        description="Gives the date, the weekday and the time.",
        parameters=_text("zone", "A time zone such as Europe/Paris; empty for the local one.", required=False),
        function="ptl.tools.clock.now",
    ),
)


def _search(path: str) -> Tool:
    if not path:
        raise ValueError("search needs documents: search=PATH, a file or a folder")
    from ptl.tools.index import index_of

    return Tool(
        name="search",
        description="Searches documents for some words and gives the passages that fit best.",
        parameters=_text("query", "Words to look for."),
        function="ptl.tools.index.search",
        bound={"index": str(index_of(Path(path)))},
    )


def _function(name: str) -> Tool:
    from transformers.utils.chat_template_utils import get_json_schema

    from ptl.rewards.worker import imported

    module, _, function = name.partition(":")
    path = f"{module}.{function}"
    try:
        found = imported(path) if find_spec(module) else None
    except (ImportError, ValueError, SyntaxError) as error:
        raise ValueError(f"tool {name!r} cannot be imported: {error}") from error
    if found is None:
        raise ValueError(f"tool {name!r} cannot be imported: there is no module {module!r} on PYTHONPATH")
    try:
        schema = get_json_schema(found)["function"]
    except Exception as error:  # it has errors of its own for docstrings and hints, of no common class
        line = " ".join(str(error).split())
        raise ValueError(
            f"tool {name!r} cannot be described: {line}; expected type hints, and a docstring with an Args section"
        ) from error
    if not re.fullmatch(r"\w+", schema["name"]):
        raise ValueError(f"tool {name!r}: the name {schema['name']!r} must be of letters, digits and underscores")
    parameters = {"type": "object", "properties": {}, **schema["parameters"]}
    return Tool(name=schema["name"], description=schema["description"], parameters=parameters, function=path)
