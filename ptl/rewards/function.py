"""A reward that is any Python function, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ptl.rewards.base import Completion, Outcome, Reward
from ptl.rewards.workers import Workers


class PythonFunction(Reward):
    """A function of one ``Completion`` to a number, or None where it does not apply.

    It runs in processes that are killed when an answer takes too long, so that a slow regular expression, an endless
    loop or a crash costs one answer and not the run. They see no GPU. A reward that needs one, or all answers of a
    prompt at once, is a subclass of ``Reward``.

    Arguments:
        function: dotted path, ``package.module.function``, that Python can import from where the run was started.
        seconds_each: time that an answer may take, above 0.
        processes: that share the work, 1 or more.
        weight: as in ``Reward``.
        name: None takes the function's.

    Raises:
        ValueError: an argument out of its range, or no such module.
    """

    seconds = None

    def __init__(
        self,
        *,
        function: str,
        seconds_each: float = 10.0,
        processes: int = 1,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        module, _, own_name = function.rpartition(".")
        super().__init__(weight=weight, name=name or own_name)
        try:
            spec = find_spec(module) if module else None
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            raise ValueError(
                f"function {function!r} cannot be imported: there is no module {module!r}; expected a dotted path such "
                "as package.module.function, from the folder of the run or PYTHONPATH"
            )
        self._workers = Workers(function, count=processes, seconds=seconds_each)

    def score(self, completions: Sequence[Completion]) -> Sequence[Outcome]:
        return self._workers.run(completions)

    def close(self) -> None:
        self._workers.close()
