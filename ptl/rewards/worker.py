"""A process that runs a function on jobs: ``python -m ptl.rewards.worker FUNCTION SECONDS MEMORY PARENT GIVES``.

Jobs come on the standard input, each as its length in 8 bytes and a pickle; outcomes go out as lines of JSON on what
was the standard output. Both are taken over before the function is imported, so that what it prints goes to standard
error and spoils nothing. Only the parent sends pickles; only JSON comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

MOST_TEXT = 1 << 20
"""Characters of a text; as JSON each is at most 6 bytes."""


def imported(path: str) -> Callable[..., Any]:
    """The function at a dotted path, ``package.module.function``.

    Raises:
        ImportError: there is none, with the reason.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name) if module else None
    except AttributeError:
        raise ImportError(f"the module {module} has no {name}") from None
    if not callable(found):
        raise ImportError(f"{path} is no function; expected a dotted path such as package.module.function")
    return found


def main(path: str, seconds: float, memory: int, parent: int, gives: str) -> None:
    """Serves until the parent closes its end or is gone."""
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        function = imported(path)
    except BaseException as error:
        return answer(missing=f"{type(error).__name__}: {error}", trace=traceback.format_exc()[-4000:])
    if memory:
        _limit("RLIMIT_AS", memory)
    answer(ready=True)
    while header := jobs.read(8):
        job = pickle.loads(jobs.read(int.from_bytes(header, "big")))
        # Backstop for a function that holds the interpreter while the parent dies: the kernel ends it.
        _limit("RLIMIT_CPU", int(time.process_time() + 4 * seconds + 10))
        try:
            answer(**(_text if gives == "text" else _number)(function(job)))
        except (BrokenPipeError, KeyboardInterrupt):
            return
        except BaseException as error:  # SystemExit too: a function must not end its process
            answer(error="raised", detail=f"{type(error).__name__}: {error}"[:2000])


def _number(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, str) and getattr(value, "shape", ()) == ():
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return {"value": float(value)}
    if value is None:
        return {"value": None}
    return {"error": "wrong_type", "detail": f"it returned {type(value).__name__}, and a number or None was expected"}


def _text(value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        return {"error": "wrong_type", "detail": f"it returned {type(value).__name__}, and a text was expected"}
    if len(value) > MOST_TEXT:
        return {
            "error": "wrong_type",
            "detail": f"it returned {len(value):,} characters, at most {MOST_TEXT:,} are read",
        }
    return {"value": value.encode(errors="replace").decode()}


def _limit(name: str, soft: int) -> None:
    """Sets a soft limit of this process where the system has it."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource

        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
