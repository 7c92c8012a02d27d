"""Wyoming's events on a connection: a line of JSON, then data, then a payload.

Owns: their limits, how long each may take. Does not know: what they mean.

Sizes are checked before anything of that size is read. Writing is the wyoming package's own.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from wyoming.event import Event, async_write_event

from edge_gemma.arguments import is_integer
from edge_gemma.server.bodies import Fields, json_fields
from edge_gemma.server.refusals import Refusal

LINE_BYTES, DATA_BYTES, PAYLOAD_BYTES = 64 << 10, 256 << 10, 1 << 20
IDLE_S = 600.0  # between two events
EVENT_S = 15.0  # for an event, once it has begun
_TYPE = 100  # characters


class LostError(Exception):
    """The connection is of no use any more. Its words are for the client."""


async def read(reader: asyncio.StreamReader) -> tuple[str, Fields, bytes] | None:
    """The next event: type, data, payload; None at the end. Raises LostError for what is no event."""
    try:
        async with asyncio.timeout(IDLE_S):
            first = await reader.read(1)
        if not first:
            return None
        async with asyncio.timeout(EVENT_S):
            return await _rest(reader, first)
    except TimeoutError:
        raise LostError("nothing has come for too long") from None
    except asyncio.LimitOverrunError:
        raise LostError(f"the line is too long, expected {LINE_BYTES} bytes at most") from None
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except Refusal as refusal:
        raise LostError(refusal.message.replace("the body", "the event")) from None


async def _rest(reader: asyncio.StreamReader, first: bytes) -> tuple[str, Fields, bytes]:
    head = json_fields(first + (b"" if first == b"\n" else await reader.readuntil(b"\n")))
    kind, data = head.text("type", ""), head.take("data", dict, "an object", {})
    data_size, payload_size = _size(head, "data_length", DATA_BYTES), _size(head, "payload_length", PAYLOAD_BYTES)
    if not kind or len(kind) > _TYPE:
        raise head.wrong("type", kind, f"1 to {_TYPE} characters")
    if data_size:
        data = {**data, **json_fields(await reader.readexactly(data_size)).values}
    payload = await reader.readexactly(payload_size) if payload_size else b""
    return kind, Fields(data), payload


def _size(head: Fields, name: str, most: int) -> int:
    value = head.values.get(name)
    value = 0 if value is None else value
    if not is_integer(value) or not 0 <= value <= most:
        raise head.wrong(name, value, f"0 to {most} bytes")
    return int(value)


async def write(writer: asyncio.StreamWriter, kind: str, data: Mapping[str, Any]) -> None:
    """Send an event. Raises ConnectionError, also for a client that takes nothing, whose connection is broken off."""
    try:
        async with asyncio.timeout(EVENT_S):
            await async_write_event(Event(kind, dict(data)), writer)
    except TimeoutError:
        writer.transport.abort()
        raise ConnectionError("the client takes nothing") from None
