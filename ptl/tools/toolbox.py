"""Runs calls: each in a process that is killed when it takes too long, and whatever happens there is an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ptl.rewards.base import Failure
from ptl.rewards.workers import Workers
from ptl.tools.base import Call, Result, Tool


class Toolbox:
    """The tools of a dialogue or of a run.

    Args:
        tools: their names differ.
        seconds: wall time that a call may take, above 0.
        characters: most of a result that the model reads, 100 or more.
        processes: calls at the same time, 1 or more.

    Raises:
        ValueError: an argument out of its range, or two tools of one name.
    """

    def __init__(
        self, tools: Sequence[Tool], *, seconds: float = 20.0, characters: int = 4000, processes: int = 1
    ) -> None:
        if characters < 100:
            raise ValueError(f"the characters of a tool's result must be 100 or more, got {characters}")
        names = [tool.name for tool in tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"there are two tools named {twice}; expected one")
        self.tools = tuple(tools)
        self.characters = characters
        self._workers = Workers("ptl.tools.worker.run", count=processes, seconds=seconds, gives="text")

    @property
    def schemas(self) -> list[dict[str, object]]:
        """As a chat template's ``tools`` variable has them."""
        return [tool.schema for tool in self.tools]

    def run(self, calls: Sequence[Call]) -> list[Result]:
        """What each call gave, in order; nothing that a tool does raises."""
        known = {tool.name: tool for tool in self.tools}
        wanted = [call for call in calls if call.problem is None]
        jobs = [(known[call.name].function, {**known[call.name].bound, **call.arguments}) for call in wanted]
        began = time.perf_counter()
        try:
            outcomes = self._workers.run(jobs)
        except RuntimeError as error:
            outcomes = [Failure("died", str(error)) for _ in jobs]
        seconds = time.perf_counter() - began
        found = dict(zip(map(id, wanted), outcomes))
        return [self._result(call, found.get(id(call)), seconds) for call in calls]

    def close(self) -> None:
        """Ends the processes; the next call starts others."""
        self._workers.close()

    def _result(self, call: Call, outcome: object, seconds: float) -> Result:
        if call.problem is not None:
            return Result(call, f"Error: {call.problem}", call.problem)
        if isinstance(outcome, Failure):
            problem = outcome.detail if outcome.reason == "raised" else f"{call.name}: {outcome.detail}"
            return Result(call, f"Error: {self._cut(problem)}", problem, seconds)
        text = str(outcome)
        if not text.strip():
            return Result(call, "(nothing)", None, seconds)
        if len(text) > self.characters:
            problem = f"{call.name} gave {len(text):,} characters, of which the first {self.characters:,} are shown"
            return Result(call, self._cut(text), problem, seconds)
        return Result(call, text, None, seconds)

    def _cut(self, text: str) -> str:
        if len(text) <= self.characters:
            return text
        return f"{text[: self.characters]}\n[cut here: {len(text):,} characters]"
