"""Turns the configuration parser's nested messages into one line: key, what is wrong, the nearest right name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re


def explain(message: str) -> str:
    """One line for a jsonargparse error message.

    The parser nests an error once for every class and every member of a union that it tried. What helps is the path
    of keys, the innermost complaint, and the nearest name that the class does accept.
    """
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    keys = [m.group(1) for line in lines if (m := re.match(r'Parser key "([^"]+)"', line))]
    classes = [m.group(1) for line in lines if (m := re.search(r"Problem with given class_path '([^']+)'", line))]
    for line in lines:
        if match := re.search(r"Option '([^']+)' is not accepted", line):
            option = match.group(1)
            key = ".".join([*keys, option])
            return f"unknown key {key!r}{_nearest(option, classes)}"
        if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", line):
            near = _near(match.group(2), dir(importlib.import_module(match.group(1))))
            return f"{'.'.join(keys) or 'class_path'}: {match.group(0)}{near}"
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        return f"unknown option {match.group(1).strip()} (see --help)"
    useful = [line for line in lines if _tells(line)]
    if useful:
        return f"{'.'.join(keys)}: {'; or '.join(dict.fromkeys(useful))}".lstrip(": ")
    return " ".join(lines)


def _tells(line: str) -> bool:
    noise = ("Parser key", "Errors:", "Subtypes:", "Given value", "Does not validate", "Problem with given class_path")
    return not line.startswith(noise) and "NoneType" not in line


def _nearest(option: str, classes: list[str]) -> str:
    """The nearest parameter of the innermost class that was tried."""
    for path in reversed(classes):
        module, _, name = path.rpartition(".")
        try:
            parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
        except (ImportError, AttributeError, ValueError, TypeError):
            continue
        return _near(option.split(".")[-1], list(parameters)) or f" ({name} accepts {', '.join(parameters)})"
    return ""


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
