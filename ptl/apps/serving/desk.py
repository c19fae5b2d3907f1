"""One model and its tools, for one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from ptl.apps.reply import Reply, Writer
from ptl.tools.base import Call, Result, Tool
from ptl.tools.calls import calls_in, form_of, stop_texts
from ptl.tools.loop import ROUNDS, Piece, Stopped, answer
from ptl.tools.toolbox import Toolbox
from ptl.types import Message

if TYPE_CHECKING:
    from ptl.data.render import Renderer


class Shown(NamedTuple):
    """A token, for a person to look at.

    Attributes:
        id: its id.
        text: what it stands for.
        mark: it is a special token, or a tag of its own.
        own: the model wrote it.
    """

    id: int
    text: str
    mark: bool
    own: bool


@dataclass
class Exchange:
    """What came of a request, filled while it is answered.

    Attributes:
        read, written: tokens that the model read and wrote, all turns together.
        finish: ``stop``, ``length`` or ``tool_calls``.
        calls: what the client shall run.
        tokens: all that the model had before it in the last turn, and what it wrote then.
    """

    read: int = 0
    written: int = 0
    finish: str = "stop"
    calls: list[Call] = field(default_factory=list)
    tokens: list[Shown] = field(default_factory=list)


class Desk:
    """Answers requests, one after the other.

    Arguments:
        writer: of the tokens.
        renderer: of the model's template.
        box: tools that the server runs itself; a client that offers tools of its own runs those.
        sampling: for what a client leaves open.
        rounds: turns that may call tools for one answer.
    """

    def __init__(
        self,
        writer: Writer,
        renderer: Renderer,
        box: Toolbox,
        sampling: Mapping[str, Any],
        rounds: int = ROUNDS,
    ) -> None:
        self.writer, self.renderer, self.box, self.sampling, self.rounds = writer, renderer, box, dict(sampling), rounds
        self._listed = box.schemas if box.tools and form_of(renderer, box.tools) == "calls" else []
        self._marks = set(renderer.tokenizer.get_added_vocab().values()) | set(renderer.tokenizer.all_special_ids)
        self._lock = threading.Lock()

    def answer(
        self,
        messages: Sequence[Message],
        exchange: Exchange,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        stops: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> Iterator[Piece | Result | Stopped]:
        """What happens until the answer is there.

        Raises:
            ValueError: the template refuses the messages, or they are too long; before the first piece.
        """
        with self._lock:
            if tools:
                yield from self._offered(messages, exchange, tools, stops, sampling or {})
                return
            dialogue = list(messages)

            def write(turns: Sequence[Message]) -> Iterator[str]:
                ends = (*stop_texts(self.box.tools), *stops)
                return self._written(turns, exchange, self._listed, ends, sampling or {})

            yield from answer(dialogue, write, self.box, rounds=self.rounds)

    def _offered(
        self,
        messages: Sequence[Message],
        exchange: Exchange,
        tools: Sequence[Mapping[str, Any]],
        stops: Sequence[str],
        sampling: Mapping[str, Any],
    ) -> Iterator[Piece]:
        """One turn; the calls in it are the client's to run."""
        known = [_tool(schema) for schema in tools]
        form = form_of(self.renderer, known)
        listed = tools if form == "calls" else ()
        text, held = "", ""
        for piece in self._written(messages, exchange, listed, (*stop_texts(known), *stops), sampling):
            text += piece
            held += piece
            # What may be the beginning of a call is not shown as text.
            if _call_begins(held, known) is None and "<" not in held[-40:]:
                yield Piece(held)
                held = ""
        exchange.calls = [call for call in calls_in(text, known) if call.problem is None]
        if exchange.calls:
            exchange.finish = "tool_calls"
            held = held[: _call_begins(held, known)].rstrip()
        if held:
            yield Piece(held)

    def _written(
        self,
        messages: Sequence[Message],
        exchange: Exchange,
        tools: Sequence[Mapping[str, Any]],
        stops: Sequence[str],
        sampling: Mapping[str, Any],
    ) -> Iterator[str]:
        reply = Reply(self.writer, self.renderer, messages, tools=tools, stops=stops, **{**self.sampling, **sampling})
        exchange.read += len(reply.prompt)
        yield from reply
        exchange.written += len(reply.ids) + (reply.end is not None)
        exchange.finish = "length" if reply.finish == "length" else "stop"
        wrote = [*reply.ids, *([] if reply.end is None else [reply.end])]
        exchange.tokens = [self._shown(i, False) for i in reply.prompt] + [self._shown(i, True) for i in wrote]

    def _shown(self, token: int, own: bool) -> Shown:
        return Shown(token, str(self.renderer.tokenizer.decode([token])), token in self._marks, own)


def _call_begins(text: str, tools: Sequence[Tool]) -> int | None:
    """Where the first call begins in a text, in either form; None where there is none."""
    places = (text.find(mark) for mark in ("<tool_call>", *(tool.opening for tool in tools)))
    return min((at for at in places if at >= 0), default=None)


def _tool(schema: Mapping[str, Any]) -> Tool:
    """A client's tool, of which only the description is here."""
    function = schema.get("function", schema)
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(
        name=str(function.get("name", "")),
        description=str(function.get("description", "")),
        parameters={"properties": {}, **parameters},
        function="",
    )
