"""The server: OpenAI's two routes, one for the page, and the page."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Generator, Iterator
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ptl.apps.guard import Door, Guard
from ptl.apps.serving.desk import Desk, Exchange
from ptl.apps.serving.protocol import Answer, Asked, BadRequest, error, parse
from ptl.tools.base import Result
from ptl.tools.loop import Piece, Stopped

LARGEST = 4 << 20
"""Bytes of a request: a context of a million characters in any alphabet."""
MOST_WAITING = 16
"""Requests that are answered or wait."""
PAGES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def build_app(desk: Desk, name: str, door: Door | None = None) -> Guard:
    """The ASGI application.

    Args:
        desk: answers.
        name: the model's, as clients see it.
        door: who may come in; by default whoever reaches the loopback address by its own name.
    """
    routes = Routes(desk, name)
    app = Starlette(
        routes=[
            *(Route(path, _fixed(file, kind)) for path, (file, kind) in PAGES.items()),
            Route("/v1/models", routes.models),
            Route("/v1/chat/completions", routes.completions, methods=["POST"]),
            Route("/api/about", routes.about),
            Route("/api/chat", routes.chat, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _told},  # pyright: ignore[reportArgumentType]
    )
    return Guard(app, door or Door(), LARGEST)


def _fixed(name: str, kind: str) -> Any:
    content = files("ptl.apps.serving").joinpath("page", name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind)

    return page


async def _told(request: Request, problem: HTTPException) -> Response:
    return JSONResponse(error(problem.detail, kind="not_found"), problem.status_code)


class Routes:
    """The JSON routes; every refusal says what was got and expected."""

    def __init__(self, desk: Desk, name: str) -> None:
        self.desk, self.name, self._here = desk, name, 0

    async def _admit(self, request: Request) -> tuple[Asked, contextlib.ExitStack] | Response:
        """What is asked, counted until the stack is closed; a refusal where it is wrong or too many wait."""
        try:
            asked = parse(await request.body())
        except BadRequest as bad:
            return JSONResponse(error(str(bad), bad.param), 400)
        if self._here >= MOST_WAITING:  # each holds a thread
            problem = f"{MOST_WAITING} requests wait already: try again later"
            return JSONResponse(error(problem, kind="overloaded"), 503)
        self._here += 1
        here = contextlib.ExitStack()
        here.callback(self._leave)
        return asked, here

    def _leave(self) -> None:
        self._here -= 1

    async def models(self, request: Request) -> Response:
        """The one model."""
        one = {"id": self.name, "object": "model", "created": 0, "owned_by": "ptl"}
        return JSONResponse({"object": "list", "data": [one]})

    async def about(self, request: Request) -> Response:
        """What the page shows of the server."""
        tools = [{"name": tool.name, "description": tool.description} for tool in self.desk.box.tools]
        return JSONResponse({"model": self.name, "tools": tools, "sampling": self.desk.sampling})

    async def completions(self, request: Request) -> Response:
        """OpenAI's chat completions."""
        admitted = await self._admit(request)
        if isinstance(admitted, Response):
            return admitted
        asked, here = admitted
        exchange, made = Exchange(), Answer(self.name)
        events = self._events(asked, exchange)
        with contextlib.ExitStack() as stack:
            stack.push(here)
            try:
                first = await run_in_threadpool(next, events, None)  # what is refused is so before a stream begins
                if asked.stream:
                    lines = _lines(self._pieces(asked, exchange, made, first, events), stack.pop_all())
                    return StreamingResponse(lines, media_type="text/event-stream")
                rest = await run_in_threadpool(list, events)
            except ValueError as refused:
                return JSONResponse(error(str(refused), "messages"), 400)
        text = "".join(event.text for event in [first, *rest] if isinstance(event, Piece))
        return JSONResponse(made.whole(_unstopped(text, asked.stop), exchange.calls, exchange.finish, _usage(exchange)))

    async def chat(self, request: Request) -> Response:
        """The page's own: a line of JSON for all that happens, with the tokens at its end."""
        admitted = await self._admit(request)
        if isinstance(admitted, Response):
            return admitted
        asked, here = admitted
        exchange = Exchange()
        events = self._events(asked, exchange)

        def told() -> Iterator[str]:
            try:
                for event in events:
                    yield json.dumps(_event(event)) + "\n"
                yield (
                    json.dumps({"done": _usage(exchange), "finish": exchange.finish, "tokens": exchange.tokens}) + "\n"
                )
            except ValueError as refused:
                yield json.dumps({"error": str(refused)}) + "\n"

        return StreamingResponse(_lines(told(), here), media_type="application/x-ndjson")

    def _events(self, asked: Asked, exchange: Exchange) -> Iterator[Piece | Result | Stopped]:
        how = {"tools": asked.tools, "stops": asked.stop, "sampling": asked.sampling}
        return self.desk.answer(asked.messages, exchange, **how)  # pyright: ignore[reportArgumentType]

    def _pieces(
        self, asked: Asked, exchange: Exchange, made: Answer, first: Any, events: Iterator[Any]
    ) -> Iterator[str]:
        yield _sse(made.piece({"role": "assistant", "content": ""}))
        shown = ""
        for event in _after(first, events):
            if isinstance(event, Piece):
                text = _unstopped(shown + event.text, asked.stop)[len(shown) :]
                shown += text
                if text:
                    yield _sse(made.piece({"content": text}))
        if exchange.calls:
            yield _sse(made.calls(exchange.calls))
        yield _sse(made.piece({}, exchange.finish))
        if asked.usage:
            yield _sse(made.counts(_usage(exchange)))
        yield "data: [DONE]\n\n"


def _after(first: Any, events: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
    yield from events


def _unstopped(text: str, stops: tuple[str, ...]) -> str:
    """Without a stop text and what follows it, as OpenAI has it."""
    cuts = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(cuts)] if cuts else text


def _sse(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _event(event: Piece | Result | Stopped) -> dict[str, Any]:
    if isinstance(event, Piece):
        return {"piece": event.text}
    if isinstance(event, Result):
        facts = {"call": str(event.call), "result": event.text, "problem": event.problem, "seconds": event.seconds}
        return {"tool": facts}
    return {"stopped": event.reason}


def _usage(exchange: Exchange) -> dict[str, int]:
    counts = {"prompt_tokens": exchange.read, "completion_tokens": exchange.written}
    return {**counts, "total_tokens": exchange.read + exchange.written}


async def _lines(made: Iterator[str], done: contextlib.ExitStack) -> AsyncIterator[str]:
    """Lines that threads make; when nobody listens any more the making ends, and with it the model's work."""
    end = object()
    with done:
        try:
            while (line := await run_in_threadpool(next, made, end)) is not end:
                yield str(line)
        finally:
            if isinstance(made, Generator):
                with contextlib.suppress(ValueError):  # a step is still under way in another thread
                    made.close()
