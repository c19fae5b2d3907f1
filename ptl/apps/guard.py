"""Who may talk to the page: the checks that come before any of its code, and the headers that go on every answer.

* Host: a name that only points at this machine from somebody else's DNS is refused (DNS rebinding).
* Origin and Sec-Fetch-Site: another site's page cannot post; and what is posted is JSON, which a form cannot send.
* Token: off loopback, the link that was printed is needed once; a cookie remembers it. Programs send it as bearer.
* Size: a body is read up to a number of bytes.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST = 64 * 1024
"""Bytes of a request's body, where the application asks for no other number."""

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Door:
    """Where the server listens, as far as the checks need it.

    Attributes:
        loopback: it listens on a loopback address only.
        names: host names it is called by, beside ``localhost`` and, off loopback, any IP address.
        token: what a visitor must bring; None asks for none.
        cookie: name of the cookie that remembers it.
    """

    loopback: bool = True
    names: frozenset[str] = frozenset()
    token: str | None = None
    cookie: str = "ptl_rank"

    def knows_host(self, value: str) -> bool:
        """Whether a Host header names this server. The port is not looked at, so that an SSH tunnel may change it."""
        try:
            name = (urlsplit(f"//{value}").hostname or "").lower().rstrip(".")
        except ValueError:
            return False
        if name == "localhost" or name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback

    def knows_token(self, given: Iterable[str]) -> bool:
        """Whether one of the values given is the token."""
        token = (self.token or "").encode()
        return self.token is None or any(hmac.compare_digest(value.encode(), token) for value in given)


class Guard:
    """ASGI middleware that holds the checks and headers of this file."""

    def __init__(self, app: ASGIApp, door: Door, largest: int = LARGEST) -> None:
        self.app, self.door, self.largest = app, door, largest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        in_link = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        refusal = self._refusal(scope["method"], headers, in_link)

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out[name] = value
                if refusal is None and self.door.token is not None and in_link:
                    cookie = f"{self.door.cookie}={self.door.token}; Path=/; HttpOnly; SameSite=Strict"
                    out.append("set-cookie", cookie)
            await send(message)

        if refusal is not None:
            return await refusal(scope, receive, dressed)
        if scope["method"] != "POST":
            return await self.app(scope, receive, dressed)
        body = await _read(receive, self.largest)
        if body is None:
            too_large = JSONResponse({"error": f"the body is larger than {self.largest} bytes"}, 413)
            return await too_large(scope, receive, dressed)
        await self.app(scope, _again(body, receive), dressed)

    def _refusal(self, method: str, headers: Headers, in_link: list[str]) -> Response | None:
        host = headers.get("host", "")
        if not self.door.knows_host(host):
            return PlainTextResponse("This server is not known under that name.\n", 403)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if not self.door.knows_token([*in_link, bearer, *_cookies(headers, self.door.cookie)]):
            return PlainTextResponse("Open the link with its token, as it was printed when the server started.\n", 403)
        if method not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("Method not allowed.\n", 405)
        if method == "POST":
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
                return JSONResponse({"error": "the request comes from another site"}, 403)
            if headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return JSONResponse({"error": "the request comes from another site"}, 403)
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return JSONResponse({"error": "expected application/json"}, 415)
        return None


def _cookies(headers: Headers, name: str) -> list[str]:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return []
    return [] if found is None else [found.value]


async def _read(receive: Receive, largest: int) -> bytes | None:
    """The body, or None where it is too large; no more than that is ever held."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > largest:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives a body that was read already, then what comes after it."""
    parts = [body]

    async def replay() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return replay


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address. Raises ``ValueError`` where it cannot."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port {port}: expected 0 to {(1 << 16) - 1}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as unknown:
        raise ValueError(f"--host {host}: {unknown.strerror}") from None
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except OSError as taken:
        listener.close()
        raise ValueError(f"cannot listen on {host} port {port} ({taken.strerror}); --port 0 takes a free one") from None
    return listener


def entrance(host: str, listener: socket.socket, name: str) -> tuple[Door, str]:
    """Who may come in, and the link that lets them: with a new token where other machines can reach the address.

    ``name`` is the application's, for its cookie.
    """
    address, port = listener.getsockname()[:2]
    bound = ipaddress.ip_address(address.partition("%")[0])
    named = socket.gethostname() if bound.is_unspecified else host
    shown = f"[{named}]" if ":" in named else named
    if bound.is_loopback:
        return Door(names=frozenset({host.lower()})), f"http://{shown}:{port}/"
    token = secrets.token_urlsafe(24)
    names = frozenset(name.lower() for name in (host, socket.gethostname(), socket.getfqdn()))
    door = Door(loopback=False, names=names, token=token, cookie=f"ptl_{name}_{port}")
    return door, f"http://{shown}:{port}/?token={token}"


def run(app: ASGIApp, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until the process is told to stop; calls ``ready`` once requests are answered and Ctrl-C ends it well."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            ready()

    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    Server(config).run(sockets=[listener])
