"""Websocket frames that no client library sends: cut, mixed, without end."""

import asyncio
import contextlib
import json
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import websockets

from edge_gemma.server import live, run
from edge_gemma.server.turns import LIVE
from tests.server.serving import Served, serving
from tests.server.test_realtime import appended

CLEAR = b'{"type": "input_audio_buffer.clear"}'
CONTINUED, TEXT, BINARY, CLOSE, PING = 0, 1, 2, 8, 9


def frame(kind: int, data: bytes, *, last: bool = True, bits: int = 0, length: int | None = None) -> bytes:
    """length: what the head says instead of the data's. Masked with zeros, which change nothing."""
    size = len(data) if length is None else length
    told = bytes([0x80 | size]) if size < 126 else struct.pack(">BQ", 0xFF, size)
    if 126 <= size < 1 << 16:
        told = struct.pack(">BH", 0xFE, size)
    return bytes([last << 7 | bits << 4 | kind]) + told + bytes(4) + data


@contextlib.contextmanager
def connected(served: Served, extensions: str = "") -> Iterator[socket.socket]:
    head = (
        "GET /v1/realtime?intent=transcription HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as connection:
        connection.sendall(f"{head}{extensions}\r\n".encode())
        found = b""
        while b"session.created" not in found:
            found += connection.recv(1 << 16)
        assert b"101" in found.splitlines()[0]
        yield connection


def received(connection: socket.socket, mark: bytes) -> bytes:
    """What comes, up to a word or the end."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while mark not in found and (data := connection.recv(1 << 16)):
            found += data
    return found


@pytest.mark.parametrize("frames", [
    [frame(TEXT, CLEAR[:5], last=False), frame(CONTINUED, CLEAR[5:9], last=False), frame(CONTINUED, CLEAR[9:])],
    [frame(TEXT, CLEAR[:5], last=False), frame(PING, b"x"), frame(CONTINUED, b"", last=False),
     frame(CONTINUED, CLEAR[5:])],
    [frame(TEXT, b"", last=False), frame(CONTINUED, CLEAR, last=False), frame(CONTINUED, b"")],
    [frame(BINARY, CLEAR), frame(TEXT, CLEAR)], [frame(TEXT, b""), frame(TEXT, CLEAR)],
    [frame(PING, b"x" * 125), frame(10, b"y"), frame(TEXT, CLEAR)],
])  # fmt: skip
def test_messages_in_pieces(served: Served, frames: list[bytes]) -> None:
    with connected(served) as connection:
        for each in frames:
            connection.sendall(each)
        assert b"input_audio_buffer.cleared" in received(connection, b"cleared")


@pytest.mark.parametrize(("frames", "code"), [
    ([frame(CONTINUED, CLEAR)], 1002), ([frame(TEXT, b"{", last=False), frame(TEXT, CLEAR)], 1002),
    ([frame(TEXT, b"\xff\xfe")], 1007), ([frame(TEXT, CLEAR, bits=4)], 1002), ([frame(3, b"")], 1002),
    ([frame(TEXT, b"x", length=1 << 62)], 1009), ([frame(TEXT, b"x", length=5 << 20)], 1009),
    ([frame(PING, b"x" * 126)], 1002), ([frame(CLOSE, b"x")], 1002), ([b"\x81\x02{}"], 1002),
    ([frame(TEXT, b"x" * (3 << 20), last=False), frame(CONTINUED, b"x" * (2 << 20))], 1009),
])  # fmt: skip
def test_frames_that_are_wrong_end_it(served: Served, frames: list[bytes], code: int) -> None:
    with connected(served) as connection:
        with contextlib.suppress(ConnectionError):
            for each in frames:
                connection.sendall(each)
        assert struct.pack(">H", code) in received(connection, struct.pack(">H", code))


def test_pongs_that_nobody_takes_do_not_pile_up(served: Served) -> None:
    sent = frame(PING, b"x" * 125) * 500_000
    with connected(served) as connection:
        connection.sendall(sent + frame(TEXT, CLEAR))
        taken = 0
        while (data := connection.recv(1 << 20)) and b"cleared" not in data:
            taken += len(data)
    assert taken < len(sent) / 2


def test_empty_pieces_do_not_pile_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = 0
    take = run._SocketProtocol.send_receive_event_to_app

    def counted(self: run._SocketProtocol) -> None:
        nonlocal kept
        kept = max(kept, len(self.frames))
        take(self)

    monkeypatch.setattr(run._SocketProtocol, "send_receive_event_to_app", counted)
    with connected(served) as connection:
        connection.sendall(frame(TEXT, CLEAR[:5], last=False))
        connection.sendall(frame(CONTINUED, b"", last=False) * 10_000 + frame(CONTINUED, CLEAR[5:]))
        assert received(connection, b"cleared")
    assert kept == 2


def test_nothing_is_unpacked(served: Served) -> None:
    """A message of 4 MB would be 4 KB on the wire."""

    async def extensions() -> object:
        async with websockets.connect(f"ws://127.0.0.1:{served.port}/v1/realtime", compression="deflate") as socket:
            return socket.protocol.extensions

    assert asyncio.run(extensions()) == []


def test_who_sends_faster_than_it_is_heard_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pongs come behind the sound that waits."""
    monkeypatch.setattr(run, "PING_S", 0.2)
    monkeypatch.setattr(live, "WAITING_BYTES", 100_000)
    never = threading.Event()

    async def talk(served: Served, over: threading.Event) -> None:
        async with websockets.connect(f"ws://127.0.0.1:{served.port}/v1/realtime", ping_interval=None) as socket:
            sound = np.zeros(24_000 * 300, "<i2")
            sending = asyncio.create_task(_send(socket, sound))
            await asyncio.sleep(2.0)
            assert not sending.done(), "it has not had to wait: the test says nothing"
            over.set()
            await sending
            await socket.send(CLEAR.decode())
            while json.loads(await asyncio.wait_for(socket.recv(), 60))["type"] != "input_audio_buffer.cleared":
                pass

    with serving() as served:
        over, held = threading.Event(), threading.Event()

        def hold() -> None:
            with served.desk.turns.turn(LIVE, never):
                held.set()
                over.wait(60)

        holding = threading.Thread(target=hold)
        holding.start()
        held.wait(60)
        try:
            asyncio.run(talk(served, over))
        finally:
            over.set()
            holding.join()


async def _send(socket: websockets.ClientConnection, sound: np.ndarray) -> None:
    for event in appended(sound, 24_000):
        await socket.send(json.dumps(event))
