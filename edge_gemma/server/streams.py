"""Answers that are sent while they are made, and the client that hangs up meanwhile.

Owns: noticing that, pings while nothing comes, when a response begins. Does not know: what is sent.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_T = TypeVar("_T")
PING_S = 10.0  # a client hears something that often, or its library gives up
FIRST_S = 5.0  # a response begins after that long, if nothing has come before: an error has its own status until then


class ClientGoneError(Exception):
    """The client has hung up."""


async def unless_gone(request: Request, result: Awaitable[_T]) -> _T:
    """Wait for `result`. Raises ClientGoneError as soon as the client hangs up; `result` is cancelled then.

    The body has to be read before.
    """
    waiting = asyncio.ensure_future(result)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGoneError
        return waiting.result()
    finally:
        await _cancelled(waiting, gone)


async def paced(items: "AsyncGenerator[_T, None]", first_s: float = FIRST_S) -> "AsyncGenerator[_T | None, None]":
    """Yields the items, and None where nothing has come for a while: for `first_s` at first, then for PING_S."""
    async with aclosing(items):
        patience = first_s
        following: asyncio.Future[_T] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(items))
                await asyncio.wait({following}, timeout=patience)
                patience = PING_S
                if not following.done():
                    yield None
                    continue
                done, following = following, None
                try:
                    item = done.result()
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if following is not None:
                await _cancelled(following)


def event(value: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {compact(value)}\n\n".encode()


PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def compact(value: Any) -> str:
    """JSON in a line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Streamed(Response):
    """A response whose parts are sent as they come. When the client hangs up, `parts` is closed at once."""

    def __init__(self, parts: AsyncGenerator[bytes, None], media_type: str) -> None:
        self.parts, self.status_code, self.media_type, self.background = parts, 200, media_type, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all parts."""
        async with aclosing(self.parts):
            sending = asyncio.create_task(self._send(send))
            gone = asyncio.create_task(_gone(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                await _cancelled(sending, gone)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
