"""Python in the sandbox: what a program prints, and the value of its last line."""

from __future__ import annotations

from ptl.rewards.sandbox import Limits, SandboxError, run_code

_RUNNER = """
import ast as _ast, io as _io, sys as _sys, traceback as _traceback
_out = _io.StringIO()
def _run(text):
    _sys.stdout = _sys.stderr = _out
    names = {"__name__": "__main__"}
    try:
        tree = _ast.parse(text)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
        exec(compile(tree, "<program>", "exec"), names)
        if last is not None:
            value = eval(compile(_ast.Expression(last.value), "<program>", "eval"), names)
            if value is not None:
                print(repr(value))
    except BaseException as error:
        print("".join(_traceback.format_exception_only(type(error), error)).strip())
    return _out.getvalue()
"""


def run(code: str, seconds: float = 10.0) -> str:
    """Runs a program without network, files or other processes.

    Args:
        code: the program; a fence around it is taken off.
        seconds: wall time.

    Returns:
        What it printed, its last line's value, and the error it ended with.

    Raises:
        ValueError: it took too long, too much memory or ended its process.
        RuntimeError: this machine has no sandbox.
    """
    text = code.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].removesuffix("```")
    try:
        result = run_code(_RUNNER, [f"_run({text!r})"], Limits(wall=seconds))
    except SandboxError as error:
        raise RuntimeError(str(error)) from error
    call = result.calls[0]
    if not call.ok:
        raise ValueError(result.error or call.error or "the program did not end well")
    return str(call.value).rstrip("\n") or "(nothing was printed)"
