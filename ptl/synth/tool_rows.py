"""From tasks to rows in which the assistant asks a tool, reads what it says, and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ptl.rewards.matching import match
from ptl.synth.idk import key_of
from ptl.synth.idk_texts import place_of
from ptl.synth.questions import message_row
from ptl.synth.tool_tasks import Task
from ptl.tools.base import Call, Result, Tool
from ptl.tools.calls import answers_of, turn_of
from ptl.tools.toolbox import Toolbox
from ptl.types import Message

Row = dict[str, Any]
_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Making:
    """How rows are made of tasks.

    Attributes:
        form: ``tags``, or ``calls`` of OpenAI's form with the tools' schemas in the row.
        held_out: share of the tasks whose question is kept for measuring, in [0, 1).

    Raises:
        ValueError: a share out of its range.
    """

    form: Literal["tags", "calls"] = "tags"
    held_out: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out must be 0 or more and below 1, got {self.held_out:g}")


class Made(NamedTuple):
    """Rows, and what became of the tasks.

    Attributes:
        train: rows to learn from.
        held_out: ``question``, ``tool``, ``answers``, ``source`` of those kept for measuring.
        counts: what became of a task -> tasks: ``train``, ``held_out``, ``duplicate``, ``failed`` (the tool), and
            ``not_found`` (its result holds no accepted answer).
    """

    train: list[Row]
    held_out: list[Row]
    counts: Counter[str]


def make_rows(
    tasks: Iterable[Task], box: Toolbox, how: Making, report: Callable[[int], object] = lambda count: None
) -> Made:
    """Runs each task's tool and writes its row; a question is held out by its words alone.

    What the tool says is in the row and never trained. A task is left out where its tool fails, or where none of its
    accepted answers is in the result: the model would learn to answer what it has not read.
    """
    known = {tool.name: tool for tool in box.tools}
    made, seen = Made([], [], Counter()), set[str]()
    batch: list[tuple[Task, str, Call]] = []

    def settle() -> None:
        for (task, key, _), result in zip(batch, box.run([call for *_, call in batch])):
            made.counts[_add(made, task, key, result, box, how)] += 1
        report(len(batch))
        batch.clear()

    for task in tasks:
        key = key_of([Message(role="user", content=task.question)])
        if key in seen:
            made.counts["duplicate"] += 1
            continue
        seen.add(key)
        tool = known[task.tool]
        given = {tool.subject: task.argument} if task.argument and tool.subject else {}
        batch.append((task, key, Call(name=tool.name, arguments=given, by_tag=how.form == "tags", id="call00000")))
        if len(batch) == _BATCH:
            settle()
    settle()
    return made


def _add(made: Made, task: Task, key: str, result: Result, box: Toolbox, how: Making) -> str:
    if result.problem is not None:
        return "failed"
    found = next((answer for answer in task.accepted if match(result.text, [answer]) is not None), None)
    if task.accepted and found is None:
        return "not_found"
    meta = {"tool": task.tool, "source": task.source, "language": task.language}
    if place_of(key, "tools held out") < how.held_out:
        answers = [] if task.tool == "clock" else list(task.accepted) or [result.text]  # what time it is changes
        made.held_out.append({"question": task.question, "answers": answers, **meta})
        return "held_out"
    said = found if task.answer is None else task.answer.format(result.text)
    tool = next(tool for tool in box.tools if tool.name == task.tool)
    asks = _asks(tool, task, result.call, how)
    turns = [Message(role="user", content=task.question), asks, *answers_of([result])]
    turns.append(Message(role="assistant", content=str(said)))
    row: Row = {"messages": [message_row(turn) for turn in turns], "meta": meta}
    made.train.append(row if how.form == "tags" else row | {"tools": box.schemas})
    return "train"


def _asks(tool: Tool, task: Task, call: Call, how: Making) -> Message:
    """The assistant's turn that calls the tool, as the loop would write it down."""
    if how.form == "calls":
        return turn_of("", [call])
    return turn_of(f"{tool.opening}{task.argument}{tool.closing}", [call])


def ordinary_rows(rows: Sequence[Row], box: Toolbox, how: Making) -> list[Row]:
    """General rows beside those with tools: in the form ``calls`` they list the tools too, and do not use them."""
    return [dict(row) if how.form == "tags" else {**row, "tools": row.get("tools") or box.schemas} for row in rows]
