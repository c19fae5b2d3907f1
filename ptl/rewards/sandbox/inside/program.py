"""One program in its own process: run it, evaluate the calls, write what came back."""

from __future__ import annotations

import json
import os
import sys
import types

from . import encode

LONGEST_MESSAGE = 500
NAME = "program"
"""Name of the module that the code becomes; not ``__main__``, so that a demonstration at its end stays still."""


def run(request: int, results: int) -> None:
    """Reads ``{"code", "calls"}`` from one descriptor and writes a line for each call to another."""
    job = json.loads(_read(request))
    os.close(request)
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module
    space = module.__dict__
    try:
        exec(compile(job["code"], f"<{NAME}>", "exec", dont_inherit=True), space)
    except BaseException as failure:  # SystemExit and KeyboardInterrupt too: the program's, not ours
        _write(results, encode.line(-1, "error", _describe(failure)))
        return
    for index, source in enumerate(job["calls"]):
        try:
            answer = encode.line(index, "value", encode.plain(_evaluate(source, space)))
        except BaseException as failure:
            answer = encode.line(index, "error", _describe(failure))
        _write(results, answer)


def _evaluate(source: str, space: dict[str, object]) -> object:
    """The value of an expression, or None after statements."""
    try:
        code = compile(source, "<call>", "eval", dont_inherit=True)
    except SyntaxError:
        code = compile(source, "<call>", "exec", dont_inherit=True)
    return eval(code, space)


def _describe(failure: BaseException) -> str:
    name = type(failure).__name__
    try:
        text = str(failure)
    except BaseException:
        text = ""
    text = f"{name}: {text}" if text else name
    return text[:LONGEST_MESSAGE].encode("utf-8", "replace").decode("utf-8")


def _read(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
