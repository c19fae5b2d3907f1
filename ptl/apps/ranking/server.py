"""The page's server: a few fixed files and four small JSON routes."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from statistics import median
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ptl.apps.guard import Door, Guard
from ptl.apps.ranking.agreement import Agreement
from ptl.apps.ranking.markup import message_html
from ptl.apps.ranking.prompts import Item
from ptl.apps.ranking.store import KeyReused, Store, Verdict

PAGES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/board.js": ("board.js", "text/javascript"),
    "/dialogs.js": ("dialogs.js", "text/javascript"),
    "/drag.js": ("drag.js", "text/javascript"),
    "/order.js": ("order.js", "text/javascript"),
    "/wire.js": ("wire.js", "text/javascript"),
    "/words.js": ("words.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""All that is served besides JSON. It is read when the server starts; no request names a file."""

FLAGS = ("unclear", "unsafe", "broken", "private", "other")
"""Why a prompt may be flagged."""

STATUS_OF = {"rank": "ranked", "skip": "skipped", "flag": "flagged"}
LONGEST_NAME, LONGEST_NOTE, LONGEST_KEY = 60, 300, 64
LONGEST_LOOK = 7 * 86_400.0
RENDERED = 512
"""Prompts whose HTML is kept."""


@dataclass(frozen=True)
class Session:
    """What a server shows and where it writes.

    Attributes:
        items: the prompts, in the order in which everybody sees them.
        store: where verdicts go.
        seed: of the order in which answers are shown.
        annotator: the only name there is, or None to let each visitor give one.
        lang: ``en``, ``fr``, or ``auto`` for the browser's.
    """

    items: Sequence[Item]
    store: Store
    seed: int = 0
    annotator: str | None = None
    lang: str = "auto"


def build_app(session: Session, door: Door | None = None) -> Guard:
    """The ASGI application.

    Args:
        session: what is ranked.
        door: who may come in; by default whoever reaches the loopback address by its own name.
    """
    routes = Routes(session)
    app = Starlette(
        routes=[
            *(Route(path, _fixed(name, kind)) for path, (name, kind) in PAGES.items()),
            Route("/api/session", routes.session),
            Route("/api/prompts/{index:int}", routes.prompt),
            Route("/api/rankings", routes.rank, methods=["POST"]),
            Route("/api/agreement", routes.agreement),
        ],
        exception_handlers={HTTPException: _told},  # pyright: ignore[reportArgumentType]
    )
    return Guard(app, door or Door())


def _fixed(name: str, kind: str) -> Any:
    content = files("ptl.apps.ranking").joinpath("page", name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=kind)

    return page


async def _told(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code)


class Routes:
    """The JSON routes. Every refusal says what was got and expected."""

    def __init__(self, session: Session) -> None:
        self.of = session
        self.places = {item.id: place for place, item in enumerate(session.items)}
        self.taus = Agreement()
        self.html = lru_cache(RENDERED)(lambda place: _html(session.items[place]))

    async def session(self, request: Request) -> Response:
        """What a page needs first; with a name, also where its annotator stopped."""
        name = self.of.annotator or request.query_params.get("annotator")
        out: dict[str, Any] = {"total": len(self.of.items), "annotator": self.of.annotator, "lang": self.of.lang}
        if name:
            out["progress"] = self._progress(_name(name), after=-1)
        return JSONResponse(out)

    async def prompt(self, request: Request) -> Response:
        """A prompt with its answers in this annotator's order, and what the annotator last said of it."""
        name = self._annotator(request.query_params)
        place = int(request.path_params["index"])
        if place >= len(self.of.items):
            raise HTTPException(404, f"there is no prompt {place}: the file has {len(self.of.items)}")
        item = self.of.items[place]
        prompt, answers = await run_in_threadpool(self.html, place)
        order = item.order(self.of.seed, name)
        last = self.of.store.last(name, item.id)
        return JSONResponse(
            {
                "index": place,
                "id": item.id,
                "version": hashlib.sha256(f"{self.of.seed} {item.content}".encode()).hexdigest()[:8],
                "prompt": prompt,
                "answers": [answers[at] for at in order],
                "last": last and {"status": last.status, "flag": last.flag, "tiers": _tiers(last, order)},
                "progress": self._progress(name, after=place),
            }
        )

    async def rank(self, request: Request) -> Response:
        """Saves a verdict. It is on disk when the answer leaves."""
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise HTTPException(400, "the body is not JSON") from None
        if not isinstance(body, dict):
            raise HTTPException(400, "the body is not an object")
        name = self._annotator(body)
        place = self.places.get(body["id"]) if isinstance(body.get("id"), str) else None
        if place is None:
            raise HTTPException(404, "the file has no prompt with this id")
        item = self.of.items[place]
        order = item.order(self.of.seed, name)
        action = body.get("action")
        if not isinstance(action, str) or action not in STATUS_OF:
            raise HTTPException(400, f"action is {action!r}; expected one of {list(STATUS_OF)}")
        tiers = _checked_tiers(body.get("tiers", []), len(order)) if action != "skip" else []
        if action == "rank" and sum(map(len, tiers)) < 2:
            raise HTTPException(400, "rank two answers or more, or skip the prompt")
        try:
            verdict = await run_in_threadpool(
                self.of.store.add,
                item,
                annotator=name,
                key=_text(body.get("key"), "key", 8, LONGEST_KEY),
                status=STATUS_OF[action],
                ranks=_ranks(tiers, order),
                order=order,
                seconds=_seconds(body.get("seconds")),
                flag=_flag(body) if action == "flag" else None,
            )
        except KeyReused as reused:
            raise HTTPException(409, str(reused)) from None
        except OSError as failure:
            raise HTTPException(507, str(failure.strerror)) from None
        return JSONResponse({"revision": verdict.revision, "progress": self._progress(name, after=place)})

    async def agreement(self, request: Request) -> Response:
        """Who has done what, and how far they agree."""
        return JSONResponse(await run_in_threadpool(self.taus.report, self.of.store.verdicts()))

    def _annotator(self, given: Mapping[str, Any]) -> str:
        return self.of.annotator or _name(given.get("annotator"))

    def _progress(self, name: str, after: int) -> dict[str, Any]:
        """Prompts done, where the next open one is (after a place, then from the start) and the median time of one."""
        lasts = [self.of.store.last(name, item.id) for item in self.of.items]
        waiting = [place for place, last in enumerate(lasts) if last is None]
        seconds = [last.seconds for last in lasts if last is not None]
        return {
            "done": len(seconds),
            "next": next((place for place in waiting if place > after), waiting[0] if waiting else None),
            "seconds": median(seconds) if seconds else None,
        }


def _html(item: Item) -> tuple[list[dict[str, str]], list[list[dict[str, str]]]]:
    return [message_html(turn) for turn in item.prompt], [[message_html(turn) for turn in of] for of in item.answers]


# ---- between places shown and answers of the file ----


def _ranks(tiers: Sequence[Sequence[int]], order: Sequence[int]) -> list[int | None]:
    """A rank for each answer of the file: 1 + how many stand above it."""
    ranks: list[int | None] = [None] * len(order)
    above = 0
    for tier in tiers:
        for place in tier:
            ranks[order[place]] = above + 1
        above += len(tier)
    return ranks


def _tiers(verdict: Verdict, order: Sequence[int]) -> list[list[int]]:
    """The places shown, best first, those that tie together."""
    known = sorted({rank for rank in verdict.ranks if rank is not None})
    return [[place for place, at in enumerate(order) if verdict.ranks[at] == rank] for rank in known]


# ---- what a request may hold ----


def _checked_tiers(value: Any, count: int) -> list[list[int]]:
    if not isinstance(value, list) or not all(isinstance(tier, list) and tier for tier in value):
        raise HTTPException(400, "tiers is not a list of lists of answers")
    flat = [place for tier in value for place in tier]
    if not all(type(place) is int and 0 <= place < count for place in flat) or len(set(flat)) < len(flat):
        raise HTTPException(400, f"tiers is {value!r}; expected each answer of 0 to {count - 1} at most once")
    return value


def _text(value: Any, what: str, least: int, most: int) -> str:
    """Trimmed text of one line. Characters are composed, so that a name typed on two systems is one name."""
    text = unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else ""
    if not least <= len(text) <= most or any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise HTTPException(400, f"{what} is not a text of {least} to {most} characters on one line")
    return text


def _name(value: Any) -> str:
    return _text(value, "annotator", 1, LONGEST_NAME)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise HTTPException(400, "seconds is not a number of 0 or more")
    return round(min(float(value), LONGEST_LOOK), 1)


def _flag(body: Mapping[str, Any]) -> str:
    reason = body.get("flag")
    if reason not in FLAGS:
        raise HTTPException(400, f"flag is {reason!r}; expected one of {list(FLAGS)}")
    note = _text(body.get("note", ""), "note", 0, LONGEST_NOTE)
    return f"{reason}: {note}" if note else str(reason)
