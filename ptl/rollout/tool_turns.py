"""Answers of several turns: where an answer asks for tools they are run, and the policy goes on from their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ptl.data.render import Renderer
from ptl.rollout.engine import Asked, Draw, Draws
from ptl.rollout.sampling import Sampled, numbered
from ptl.tools.base import Result, Tool
from ptl.tools.between import between
from ptl.tools.calls import answers_of, calls_in, form_of, turn_of
from ptl.tools.load import load_tools
from ptl.tools.toolbox import Toolbox
from ptl.types import Message, Prompt


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Tools that a policy may use while it answers.

    Arguments:
        names: ``search=PATH``, ``python``, ``calculator``, ``clock``, ``package.module:function``.
        rounds: turns of an answer that may call tools, 1 or more.
        seconds: wall time that a call may take, above 0.
        characters: most of a result that the policy reads, 100 or more.
        processes: calls at the same time on each rank, 1 or more.

    Raises:
        ValueError: no tool, or a number out of its range.
    """

    names: list[str]
    rounds: int = 3
    seconds: float = 20.0
    characters: int = 2000
    processes: int = 2

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("model.tools.names is empty: name a tool such as calculator, or leave model.tools out")
        if self.rounds < 1:
            raise ValueError(f"model.tools.rounds must be 1 or more, got {self.rounds}")
        self.toolbox()  # a tool that is none is told before anything is loaded

    def toolbox(self) -> Toolbox:
        """The tools; no process is started before the first call."""
        limits = {"seconds": self.seconds, "characters": self.characters, "processes": self.processes}
        return Toolbox(load_tools(self.names), **limits)  # pyright: ignore[reportArgumentType]


class Written(NamedTuple):
    """An answer of one or more turns.

    Attributes:
        ids: all that follows the prompt, what tools said included.
        own: bool a token, True for what the policy drew.
        logprobs: a token, NaN for what it did not draw; empty where the engine does not know them.
        text: of its last turn, without the token that ended it.
        finished: the last turn came to its end, and asked for no tool.
        messages: the dialogue, the answer's turns included.
        results: of the tools.
    """

    ids: list[int]
    own: list[bool]
    logprobs: list[float]
    text: str
    finished: bool
    messages: list[Message]
    results: list[Result]


def one_turn(drawn: Sampled, renderer: Renderer, stop: Sequence[int]) -> Written:
    """An answer without tools."""
    ended = bool(drawn.ids) and drawn.ids[-1] in stop
    text = str(renderer.tokenizer.decode(drawn.ids[: len(drawn.ids) - ended]))
    known = drawn.logprobs if len(drawn.logprobs) == len(drawn.ids) else []
    return Written(drawn.ids, [True] * len(drawn.ids), known, text, ended, [], [])


@dataclass
class _Open:
    """An answer that is being written."""

    place: tuple[int, int]
    prompt: Asked
    messages: list[Message]
    schemas: list
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    results: list[Result] = field(default_factory=list)

    def take(self, drawn: Sampled, renderer: Renderer, stop: Sequence[int]) -> None:
        self.ended = bool(drawn.ids) and drawn.ids[-1] in stop
        self.ids += drawn.ids
        self.own += [True] * len(drawn.ids)
        self.logprobs += drawn.logprobs
        self.text = str(renderer.tokenizer.decode(drawn.ids[: len(drawn.ids) - self.ended]))

    @property
    def room(self) -> int:
        return self.prompt.limit - len(self.ids)


def closing_ids(renderer: Renderer, tools: Sequence[Tool]) -> tuple[int, ...]:
    """Tokens that close a tool's tag, of those that are one token: what ends a turn beside its end."""
    known = renderer.tokenizer.get_added_vocab()
    return tuple(known[tool.closing] for tool in tools if tool.closing in known)


def answered_with_tools(
    draw: Draw,
    draws: Draws,
    asked: Sequence[Asked],
    prompts: Sequence[Prompt],
    renderer: Renderer,
    box: Toolbox,
    rounds: int,
) -> list[list[Written]]:
    """K answers to each prompt; ``Asked.limit`` bounds all tokens of an answer, those of the tools too.

    An answer that has no room left for a result, or asks for more than ``rounds`` times, ends unfinished. What is drawn
    depends on the seed, the prompt's number, the answer's place and the round alone.
    """
    closing = closing_ids(renderer, box.tools)
    listed = box.schemas if form_of(renderer, box.tools) == "calls" else []
    first = draws._replace(stop=(*draws.stop, *closing))
    pending = []
    done: list[list[_Open]] = []
    for i, (one, prompt, answers) in enumerate(zip(asked, prompts, draw(asked, first))):
        group = [_Open((i, k), one, list(prompt.messages), list(prompt.tools) or listed) for k in range(len(answers))]
        for each, drawn in zip(group, answers):
            each.take(drawn, renderer, draws.stop)
        pending += group
        done.append(group)
    for round_ in range(1, rounds + 1):
        pending = _with_results(pending, renderer, box)
        if not pending:
            break
        more = [
            Asked([*each.prompt.ids, *each.ids], each.prompt.number * draws.samples + each.place[1], each.room)
            for each in pending
        ]
        how = first._replace(samples=1, seed=numbered(draws.seed, round_))
        for each, [drawn] in zip(pending, draw(more, how)):
            each.take(drawn, renderer, draws.stop)
    return [[_written(each, box.tools) for each in group] for group in done]


def _with_results(pending: Sequence[_Open], renderer: Renderer, box: Toolbox) -> list[_Open]:
    """Runs what the answers ask for; those that have a result and room to go on."""
    calls = [calls_in(each.text, box.tools, len(each.results)) for each in pending]
    results = iter(box.run([call for some in calls for call in some]))
    going = []
    for each, some in zip(pending, calls):
        got = [next(results) for _ in some]
        if not some:
            continue
        turn, told = turn_of(each.text, some), answers_of(got)
        bridge = between(renderer, each.messages, turn, told, each.schemas, ended=each.ended)
        each.results += got
        if len(bridge) >= each.room:
            each.ended = False  # it asked, and there is no room to answer
            continue
        each.ids += bridge
        each.own += [False] * len(bridge)
        each.logprobs += [float("nan")] * (len(bridge) if each.logprobs else 0)
        each.messages += [turn, *told]
        going.append(each)
    return going


def _written(each: _Open, tools: Sequence[Tool]) -> Written:
    calls = calls_in(each.text, tools)
    messages = [*each.messages, turn_of(each.text, [call for call in calls if call.by_tag])]
    known = each.logprobs if len(each.logprobs) == len(each.ids) else []
    return Written(each.ids, each.own, known, each.text, each.ended and not calls, messages, each.results)
