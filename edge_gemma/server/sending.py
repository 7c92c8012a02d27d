"""An answer on its way to a client, whole or as a stream, whatever the protocol.

Owns: when a response begins, how entries become bytes, errors inside a stream. Does not know: the fields of requests
and answers.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from edge_gemma.generation.generate import Result
from edge_gemma.server.ask import Ask, Step
from edge_gemma.server.desk import Desk
from edge_gemma.server.refusals import Refusal, refusal_of
from edge_gemma.server.streams import DONE, PING, Streamed, compact, event, paced, unless_gone

Entry = dict[str, Any]  # an object of JSON that is sent by itself


@dataclass(frozen=True)
class Wire:
    """How entries are sent. line: an entry's bytes. ping: sent while nothing comes. end: sent last."""

    media_type: str
    line: Callable[[Entry], bytes]
    ping: bytes
    end: bytes = b""


EVENTS = Wire("text/event-stream", event, PING, DONE)
NAMED_EVENTS = Wire("text/event-stream", lambda entry: event(entry, entry["type"]), PING)


def json_lines(ping: Entry) -> Wire:
    """JSON, a value a line. ping: a value that says nothing, because clients read every line."""
    return Wire("application/x-ndjson", json_line, json_line(ping))


def json_line(entry: Entry) -> bytes:
    """An entry in a line of its own."""
    return f"{compact(entry)}\n".encode()


class Writer(Protocol):
    """One answer in the form of a protocol."""

    @property
    def wire(self) -> Wire: ...
    def whole(self, steps: Sequence[Step], result: Result) -> Entry: ...
    def begin(self) -> Iterable[Entry]: ...
    def step(self, step: Step) -> Iterable[Entry]: ...
    def end(self, result: Result) -> Iterable[Entry]: ...
    def failed(self, refusal: Refusal) -> Iterable[Entry]: ...


async def respond(request: Request, desk: Desk, ask: Ask, writer: Writer, *, stream: bool) -> Response:
    """The response to a request whose body was read. Raises as Desk.answer, and ClientGoneError."""
    client = client_of(request)
    if not stream:
        steps, result = await unless_gone(request, whole(desk, ask, client))
        return JSONResponse(writer.whole(steps, result))
    parts = paced(desk.answer(ask, client))
    first = await unless_gone(request, anext(parts))
    return Streamed(_streamed(writer, first, parts), writer.wire.media_type)


async def whole(desk: Desk, ask: Ask, client: str) -> tuple[list[Step], Result]:
    """An answer, once it is finished."""
    steps: list[Step] = []
    async with aclosing(desk.answer(ask, client)) as parts:
        async for part in parts:
            if isinstance(part, Result):
                return steps, part
            steps.append(part)
    raise RuntimeError("an answer has ended without its result")


async def _streamed(
    writer: Writer, first: Step | Result | None, rest: AsyncGenerator[Step | Result | None, None]
) -> AsyncGenerator[bytes, None]:
    wire = writer.wire
    async with aclosing(rest):
        for entry in writer.begin():
            yield wire.line(entry)
        try:
            for line in _lines(writer, first):
                yield line
            async for part in rest:
                for line in _lines(writer, part):
                    yield line
        except Exception as error:
            for entry in writer.failed(refusal_of(error)):
                yield wire.line(entry)
        if wire.end:
            yield wire.end


def _lines(writer: Writer, part: Step | Result | None) -> Iterator[bytes]:
    if part is None:
        yield writer.wire.ping
        return
    for entry in writer.end(part) if isinstance(part, Result) else writer.step(part):
        yield writer.wire.line(entry)


def client_of(request: Request) -> str:
    """Who asks, for a fair order."""
    return request.client.host if request.client else "-"
