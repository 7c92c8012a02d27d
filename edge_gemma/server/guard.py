"""What every request passes: who may ask, from where, how long it may take to say it; and how errors are told.

Owns: the key, Host and Origin, slow senders, request ids, the log's line for each request. Does not know: what is
asked for.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edge_gemma.server.bodies import Room, RoomPart
from edge_gemma.server.desk import current_request
from edge_gemma.server.refusals import Refusal, refusal_of
from edge_gemma.server.streams import ClientGoneError

log = logging.getLogger("edge_gemma.server")

IDLE_S = 15.0  # between two parts of a body
BODY_S = 600.0  # for a whole body
HELD_BYTES = 128 << 20  # of all bodies that are in memory
_FORMS = "/v1/audio/"  # their bodies go to disk, and have room of their own (uploads.py)
_OPEN = ("/", "/health", "/page/")  # paths without a key: the page's files hold no secret
_LOCAL = ("localhost", "127.0.0.1", "::1")
KEY_PROTOCOL = "openai-insecure-api-key."  # browsers cannot send headers with a websocket


@dataclass(frozen=True)
class Rules:
    """Who may ask. key: None for no key. hosts: names of this server, besides those of loopback; "*" for any.

    origins: of web pages elsewhere that may ask, "*" for all.
    """

    key: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()


class Guard:
    """The outermost part of the server."""

    def __init__(self, app: ASGIApp, rules: Rules, count: Callable[[str, int, float], None]) -> None:
        """count: told the path, the status and the seconds of each request."""
        self._app, self._rules, self._count, self._room = app, rules, count, Room(HELD_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what may pass."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request = _Request(scope, send)
        body = self._room.part(request.client)
        try:
            self._check(scope)
            await self._app(scope, self._reader(scope, receive, body), request.send)
        except (ClientGoneError, ClientDisconnect):
            request.status = request.status or 499  # nginx's word for it
        except asyncio.CancelledError:  # by the server, which ends
            await request.refuse(Refusal(503, "the server is being stopped", "server_error", "stopping"), receive)
        except Exception as error:
            await request.refuse(refusal_of(error), receive)
        finally:
            body.give()
            route = scope.get("route")
            self._count(getattr(route, "path", "other"), request.status, request.seconds)
            request.tell()

    def _reader(self, scope: Scope, receive: Receive, body: RoomPart) -> Receive:
        if scope["type"] == "websocket":
            return receive
        return _in_time(receive, body.take if not scope["path"].startswith(_FORMS) else lambda size: None)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if "*" not in self._rules.hosts and _name(host) not in (*_LOCAL, *map(str.lower, self._rules.hosts)):
            told = f"the Host {host!r:.80} is none of this server: start it with --allow-host, or use its address"
            raise Refusal(403, told, "permission_error", "wrong_host")
        if origin is not None and not self._is_known(origin, host):
            told = f"pages of {origin!r:.80} may not use this server: start it with --cors {origin:.80}"
            raise Refusal(403, told, "permission_error", "wrong_origin")
        if scope.get("method") == "OPTIONS" or path in _OPEN[:2] or path.startswith(_OPEN[2]):
            return
        if self._rules.key is not None and not hmac.compare_digest(_key(headers).encode(), self._rules.key.encode()):
            told = "this server needs its key: send it as Authorization: Bearer KEY"
            headers_back = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, told, "authentication_error", "invalid_api_key", headers=headers_back)

    def _is_known(self, origin: str, host: str) -> bool:
        if "*" in self._rules.origins or origin in self._rules.origins:
            return True
        with suppress(ValueError):  # no address
            return urlsplit(origin).netloc.lower() == host
        return False


class _Request:
    """What became of one request."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self.status, self._send = scope, 0, send
        self.index, self._since = f"req_{secrets.token_hex(8)}", time.perf_counter()
        current_request.set(self.index)

    @property
    def client(self) -> str:
        return str((self.scope.get("client") or ("-",))[0])

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            safe = [(b"x-request-id", self.index.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": [*message.get("headers", ()), *safe]}
        elif message["type"] == "websocket.accept":
            self.status = 101
        await self._send(message)

    async def refuse(self, refusal: Refusal, receive: Receive) -> None:
        """Tell a client what went wrong; after a response has begun, only the log is told."""
        if refusal.status == 500:
            log.exception("%s failed", self.index)
        if self.scope["type"] == "websocket":
            self.status = self.status or refusal.status
            code = 1011 if refusal.status >= 500 else 1008
            await self._send({"type": "websocket.close", "code": code, "reason": refusal.message[:120]})
        elif not self.status:
            await told(refusal, self.scope["path"])(self.scope, receive, self.send)

    def tell(self) -> None:
        """A line of the log."""
        method = self.scope.get("method", "WS")
        log.info(
            "%s %s %s %s %.3fs from %s", self.index, method, _shown(self.scope["path"]), self.status, self.seconds,
            self.client,
        )  # fmt: skip


def told(refusal: Refusal, path: str) -> Response:
    """A refusal in the form of the protocol that the path belongs to."""
    if path.startswith("/api/"):
        body: dict[str, Any] = {"error": refusal.message}
    else:
        body = {"error": openai_error(refusal)}
    return JSONResponse(body, refusal.status, refusal.headers)


def openai_error(refusal: Refusal) -> dict[str, Any]:
    """A refusal in OpenAI's form."""
    return {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": refusal.code}


def _in_time(receive: Receive, take: Callable[[int], None]) -> Receive:
    """As `receive`, but a body that comes too slowly is refused. take: told the bytes of each part."""
    end = time.monotonic() + BODY_S
    reading = True

    async def timed() -> Message:
        nonlocal reading
        if not reading:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), min(IDLE_S, max(0.0, end - time.monotonic())))
        except TimeoutError:
            raise Refusal(408, "the body comes too slowly: send it again", code="too_slow") from None
        reading = bool(message.get("more_body"))
        take(len(message.get("body", b"")))
        return message

    return timed


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    offered = (word.strip() for word in headers.get("sec-websocket-protocol", "").split(","))
    given = (word.removeprefix(KEY_PROTOCOL) for word in offered if word.startswith(KEY_PROTOCOL))
    return next(given, headers.get("x-api-key", ""))


def _shown(path: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in path[:120])
