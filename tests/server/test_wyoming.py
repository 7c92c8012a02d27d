"""Wyoming, by its own client: speech in real time, conversations, and what Home Assistant does."""

import asyncio
import contextlib
import gc
import json
import select
import socket
import threading
import time
import warnings
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from edge_gemma.audio.files import AudioFile
from edge_gemma.server import desk as desks
from edge_gemma.server import hearing, stalled, wyoming, wyoming_events
from edge_gemma.server.agent import Tools
from edge_gemma.server.moderation import Moderation
from edge_gemma.tools.function import RunnableTool
from tests import ROOT
from tests.server.serving import Served, serving
from tests.waiting import until

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its audio module: of audioop
    from wyoming.asr import Transcribe, Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
    from wyoming.audio import AudioChunk, AudioStart, AudioStop
    from wyoming.client import AsyncTcpClient
    from wyoming.error import Error
    from wyoming.event import Event
    from wyoming.handle import Handled, HandledChunk
    from wyoming.info import Describe, Info
    from wyoming.ping import Ping, Pong
    from wyoming.vad import VoiceStarted, VoiceStopped

TIMER = ROOT / "examples" / "timer.wav"
SPEECH = ROOT / "tests" / "speech"


@contextlib.asynccontextmanager
async def connected(served: Served) -> AsyncIterator[AsyncTcpClient]:
    async with AsyncTcpClient("127.0.0.1", served.wyoming) as client:
        yield client


def sound(*paths: Any, silence_s: float = 0.0) -> np.ndarray:
    """float32 [n] of 16 kHz, with silence behind each file."""
    parts = []
    for path in paths:
        with AudioFile(path) as file:
            parts += [*file, np.zeros(int(16_000 * silence_s), np.float32)]
    return np.concatenate(parts)


def chunks(samples: np.ndarray, rate: int = 16_000, width: int = 2, channels: int = 1) -> list[AudioChunk]:
    """Chunks of 64 ms."""
    import soxr

    samples = soxr.resample(samples, 16_000, rate)
    whole = (samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    if width == 1:
        data = (whole + 128).astype(np.uint8).reshape(-1, 1)
    else:
        data = whole.view(np.uint8).reshape(-1, 4)[:, :width]
    frames = np.tile(data, (1, channels)).tobytes()
    step = rate * 64 // 1000 * width * channels
    return [AudioChunk(rate, width, channels, frames[at : at + step]) for at in range(0, len(frames), step)]


async def send(client: AsyncTcpClient, *events: Any) -> None:
    for event in events:
        await client.write_event(event.event())


async def speak(client: AsyncTcpClient, parts: Sequence[AudioChunk], speed: float = 1.0) -> None:
    """In real time, or faster."""
    due = time.monotonic()
    for part in parts:
        due += part.seconds / speed
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        await client.write_event(part.event())


async def following(client: AsyncTcpClient, *last: Any) -> list[Event]:
    """Events up to one of a kind."""
    events: list[Event] = []
    while not events or not any(kind.is_type(events[-1].type) for kind in last):
        event = await asyncio.wait_for(client.read_event(), 60)
        assert event is not None, [each.type for each in events]
        events.append(event)
    return events


async def transcribed(client: AsyncTcpClient, parts: Sequence[AudioChunk], **asked: Any) -> list[Event]:
    first = parts[0]
    await send(client, Transcribe(**asked), AudioStart(first.rate, first.width, first.channels), *parts, AudioStop())
    return await following(client, TranscriptStop, Error)


def text_of(events: list[Event]) -> str:
    return next(str(event.data["text"]) for event in events if Transcript.is_type(event.type))


def test_what_it_can_do(served: Served) -> None:
    async def ask() -> Event:
        async with connected(served) as client:
            await send(client, Describe())
            return (await following(client, Info))[-1]

    info = Info.from_event(asyncio.run(ask()))
    assert [program.name for program in info.asr] == ["edge-gemma"]
    asr = info.asr[0]
    assert asr.supports_transcript_streaming
    assert not asr.requires_external_vad
    assert asr.installed
    assert asr.models[0].name == "demo"
    assert "en" in asr.models[0].languages
    assert [model.name for model in info.handle[0].models] == ["demo"]
    assert info.handle[0].supports_handled_streaming
    assert not info.handle[0].supports_home_control


def test_it_lives(served: Served) -> None:
    async def ask() -> Event:
        async with connected(served) as client:
            await send(client, Ping(text="are you there"))
            return (await following(client, Pong))[-1]

    assert asyncio.run(ask()).data == {"text": "are you there"}


@pytest.mark.parametrize("speed", [4.0, 1e9])
def test_a_recording(served: Served, speed: float) -> None:
    """Faster than it is spoken: pauses end nothing, all of it is written down."""

    async def ask() -> list[Event]:
        async with connected(served) as client:
            parts = chunks(sound(TIMER, SPEECH / "09.flac", SPEECH / "02.flac", silence_s=1.5))
            await send(client, Transcribe(language="en", name="demo"), AudioStart(16_000, 2, 1))
            await speak(client, parts, speed)
            await send(client, AudioStop())
            return await following(client, TranscriptStop, Error)

    events = asyncio.run(ask())
    kinds = [event.type for event in events]
    text = text_of(events)
    assert all(word in text.lower() for word in ("timer", "radio", "time is it"))
    assert "".join(event.data["text"] for event in events if TranscriptChunk.is_type(event.type)) == text
    assert kinds.count("voice-started") == kinds.count("voice-stopped") == 3
    assert kinds.index("transcript-start") < kinds.index("transcript-chunk") < kinds.index("transcript")
    assert events[-2].data == {"text": text, "language": "en"}


@pytest.mark.parametrize("burst", [0, 12])
def test_it_ends_the_turn_itself(served: Served, burst: int) -> None:
    """In real time, as Home Assistant sends it: up and down side by side, the text before audio-stop.

    burst: chunks that have waited for the connection, as after a wake word.
    """

    async def ask() -> tuple[list[Event], bool]:
        async with connected(served) as client:
            await send(client, Transcribe(language="en"), AudioStart(16_000, 2, 1))
            parts = chunks(sound(TIMER, silence_s=20.0))
            await send(client, *parts[:burst])
            speaking = asyncio.create_task(speak(client, parts[burst:]))
            events = await following(client, Transcript)
            early = not speaking.done()
            speaking.cancel()
            return events, early

    events, early = asyncio.run(ask())
    assert early
    assert "timer" in text_of(events).lower()
    started = next(event.data["timestamp"] for event in events if VoiceStarted.is_type(event.type))
    stopped = next(event.data["timestamp"] for event in events if VoiceStopped.is_type(event.type))
    assert 0 <= started < stopped < 3000
    assert any(TranscriptStart.is_type(event.type) for event in events)


def test_what_comes_after_the_turn_is_nothing(served: Served) -> None:
    async def ask() -> str:
        async with connected(served) as client:
            await send(client, AudioStart(16_000, 2, 1))  # without a `transcribe`, as older clients do
            parts = chunks(sound(TIMER, silence_s=1.0))
            speaking = asyncio.create_task(speak(client, parts))
            await following(client, TranscriptStop)
            await speaking
            await send(client, *parts, AudioStop())
            return text_of(await transcribed(client, chunks(sound(SPEECH / "09.flac"))))

    assert "radio" in asyncio.run(ask()).lower()


def test_silence_ends_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Home Assistant leaves it to us: without an end it would wait for ever."""
    monkeypatch.setattr(hearing, "NOBODY_S", 1.0)

    async def ask() -> tuple[str, bool]:
        async with connected(served) as client:
            await send(client, Transcribe(), AudioStart(16_000, 2, 1))
            speaking = asyncio.create_task(speak(client, chunks(np.zeros(16_000 * 20, np.float32))))
            text = text_of(await following(client, Transcript))
            early = not speaking.done()
            speaking.cancel()
            return text, early

    assert asyncio.run(ask()) == ("", True)


@pytest.mark.parametrize(
    ("rate", "width", "channels"),
    [(16_000, 2, 2), (24_000, 2, 1), (44_100, 3, 2), (48_000, 4, 1), (22_050, 1, 1), (8_000, 2, 8)],
)
def test_any_format(served: Served, rate: int, width: int, channels: int) -> None:
    async def ask() -> str:
        async with connected(served) as client:
            return text_of(await transcribed(client, chunks(sound(TIMER), rate, width, channels)))

    text = asyncio.run(ask()).lower()
    assert "timer" in text or (rate == 8_000 and text), "half of the band is missing there"


def test_chunks_that_cut_samples(served: Served) -> None:
    async def ask() -> str:
        async with connected(served) as client:
            data = b"".join(part.audio for part in chunks(sound(TIMER)))
            parts = [AudioChunk(16_000, 2, 1, data[at : at + 999]) for at in range(0, len(data), 999)]
            return text_of(await transcribed(client, parts))

    assert "timer" in asyncio.run(ask()).lower()


WRONG: list[tuple[list[tuple[str, dict[str, Any]]], str]] = [
    ([("audio-chunk", {"rate": 16000, "width": 2, "channels": 1})], "before audio-start"),
    ([("audio-stop", {})], "before audio-start"),
    ([("audio-start", {})], "rate"),
    ([("audio-start", {"rate": 16000, "width": 9, "channels": 1})], "width"),
    ([("audio-start", {"rate": 1 << 40, "width": 2, "channels": 1})], "rate"),
    ([("audio-start", {"rate": True, "width": 2, "channels": 1})], "rate"),
    ([("transcribe", {"language": "zz"}), ("audio-start", {"rate": 16000, "width": 2, "channels": 1})], "language"),
    ([("transcribe", {"name": "gemma9"}), ("audio-start", {"rate": 16000, "width": 2, "channels": 1})], "gemma9"),
    ([("transcribe", {"language": 5}), ("audio-start", {"rate": 16000, "width": 2, "channels": 1})], "language"),
    ([("synthesize", {"text": "hello"})], "synthesize"),
    ([("transcript", {})], "text"),
    ([("transcript", {"text": ""})], "characters"),
    ([("transcript", {"text": "x" * 5000})], "characters"),
    ([("transcript", {"text": "x", "context": {"conversation_id": "x" * 300}})], "conversation_id"),
    ([("transcript", {"text": "x", "context": 7})], "context"),
    ([("ping", {"text": 5})], "text"),
]  # fmt: skip


def test_what_is_wrong_is_told_and_the_connection_goes_on(served: Served) -> None:
    async def ask() -> None:
        async with connected(served) as client:
            for events, told in WRONG:
                for kind, data in events:
                    await client.write_event(Event(kind, data))
                error = (await following(client, Error))[-1]
                assert told in error.data["text"], (events, error.data)
                assert error.data["code"]
            await client.write_event(Event("no-such-event", {"a": 1}))
            await client.write_event(Event("select-program", {"name": "edge-gemma"}))
            assert "timer" in text_of(await transcribed(client, chunks(sound(TIMER)))).lower()

    asyncio.run(ask())


def test_another_format_in_the_middle(served: Served) -> None:
    async def ask() -> str:
        async with connected(served) as client:
            await send(client, AudioStart(16_000, 2, 1), AudioChunk(16_000, 2, 1, bytes(2000)))
            await send(client, AudioChunk(48_000, 2, 1, bytes(2000)))
            return str((await following(client, Error))[-1].data["text"])

    assert "48000" in asyncio.run(ask())


def test_one_request_at_a_time(served: Served) -> None:
    async def ask() -> str:
        async with connected(served) as client:
            await send(client, AudioStart(16_000, 2, 1), AudioChunk(16_000, 2, 1, bytes(2000)))
            await send(client, AudioStart(16_000, 2, 1))
            return str((await following(client, Error))[-1].data["code"])

    assert asyncio.run(ask()) == "busy"


def test_a_conversation(served: Served) -> None:
    async def ask() -> tuple[list[Event], list[Event]]:
        async with connected(served) as client:
            context = {"conversation_id": "kitchen", "device_id": "d", "satellite_id": None}
            await send(client, Transcript("My name is Anna.", context=context, language="en"))
            first = await following(client, Handled)
            await client.read_event()  # handled-stop
            await send(client, Transcript("What is my name?", context=context))
            return first, await following(client, Handled)

    first, second = asyncio.run(ask())
    assert first[-1].data["text"]
    assert first[-1].data["context"] == {"conversation_id": "kitchen"}
    pieces = "".join(event.data["text"] for event in second if HandledChunk.is_type(event.type))
    assert pieces == second[-1].data["text"]
    assert second[0].type == "handled-start"


def test_one_question_after_another(served: Served) -> None:
    """As soon as an answer is there, as Home Assistant reads it."""

    async def ask() -> None:
        async with connected(served) as client:
            for _ in range(10):
                await send(client, Transcript("hello"))
                assert (await following(client, Handled, Error))[-1].type == "handled"
            for _ in range(3):
                await send(client, Transcribe(), AudioStart(16_000, 2, 1), *chunks(sound(TIMER)), AudioStop())
                assert (await following(client, Transcript, Error))[-1].type == "transcript"

    asyncio.run(ask())


def test_tools_are_run() -> None:
    from edge_gemma.tools.builtin import builtin_tools

    with serving(agent={"tools": Tools([], builtin_tools(None))}) as served:

        async def ask() -> str:
            async with connected(served) as client:
                await send(client, Transcript("What time is it?"))
                return str((await following(client, Handled))[-1].data["text"])

        found = asyncio.run(ask())
        now = time.localtime()
        assert any(f":{minute:02}" in found for minute in (now.tm_min, (now.tm_min - 1) % 60)), found


def test_tools_wait_without_a_turn() -> None:
    """Speech is heard while a tool takes its time."""
    began, go_on = threading.Event(), threading.Event()

    def get_time() -> str:
        """What time it is."""
        began.set()
        go_on.wait(60)
        return "12:34"

    with serving(agent={"tools": Tools([RunnableTool(get_time)])}) as served:

        async def ask() -> tuple[str, str]:
            async with connected(served) as client, connected(served) as other:
                await send(client, Transcript("What time is it?"))
                await asyncio.to_thread(began.wait, 60)
                assert began.is_set()
                heard = text_of(await transcribed(other, chunks(sound(TIMER))))
                go_on.set()
                return heard, str((await following(client, Handled))[-1].data["text"])

        heard, answer = asyncio.run(ask())
        assert "timer" in heard.lower()
        assert "34" in answer


def test_answers_are_moderated() -> None:
    def check(text: str, where: str) -> str:
        return "nothing" if where == "answer" else text

    with serving(moderation=Moderation(check)) as served:  # type: ignore[arg-type]

        async def ask() -> list[Event]:
            async with connected(served) as client:
                await send(client, Transcript("hello"))
                return await following(client, Handled)

        events = asyncio.run(ask())
        assert set(events[-1].data["text"].split()) == {"nothing"} or events[-1].data["text"].startswith("nothing")


def raw(served: Served, *parts: bytes) -> bytes:
    """What comes back until the server ends it."""
    with socket.create_connection(("127.0.0.1", served.wyoming), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        found = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 16):
                found += data
        return found


@pytest.mark.parametrize(
    "sent",
    [
        b"\n", b"{}\n", b"[]\n", b"no json\n", b'{"type": 5}\n', b'{"type": ""}\n', b'{"type": "ping", "data": 3}\n',
        b'{"type": "audio-chunk", "payload_length": 999999999999}\n',
        b'{"type": "audio-chunk", "payload_length": -1}\n', b'{"type": "audio-chunk", "payload_length": "7"}\n',
        b'{"type": "audio-chunk", "payload_length": 1e3}\n', b'{"type": "audio-chunk", "payload_length": true}\n',
        b'{"type": "ping", "data_length": 300000}\n', b'{"type": "ping", "data_length": 4}\nnull',
        b'{"type": "ping", "data_length": 3}\n\xff\xff\xff', b"{" * 70_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n",
        b"\xff\xfe\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n",
    ],
)  # fmt: skip
def test_garbage_ends_the_connection_with_a_word(served: Served, sent: bytes) -> None:
    found = raw(served, sent)
    head, _, rest = found.partition(b"\n")
    assert json.loads(head)["type"] == "error"
    assert json.loads(rest)["code"] == "invalid_event"
    assert b"Traceback" not in found


def test_slow_and_silent_peers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wyoming_events, "EVENT_S", 0.2)
    assert b"too long" in raw(served, b'{"type": "ping"')
    assert b"too long" in raw(served, b'{"type": "audio-chunk", "payload_length": 9}\nabc')
    monkeypatch.setattr(wyoming_events, "IDLE_S", 0.2)
    assert b"too long" in raw(served)


def test_many_connections(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wyoming, "CONNECTIONS", 0)
    assert b"too many" in raw(served, b'{"type": "describe"}\n')
    monkeypatch.setattr(desks, "MOST_LIVE", 0)
    monkeypatch.setattr(wyoming, "CONNECTIONS", 9)

    async def ask() -> Event:
        async with connected(served) as client:
            return (await transcribed(client, chunks(sound(TIMER))))[-1]

    assert asyncio.run(ask()).data["code"] == "too_many_live"


def connections(served: Served, own: socket.socket) -> list[Any]:
    """The server's ends of a client's connection, closed or not."""
    client = own.getsockname()
    kind = asyncio.selector_events._SelectorSocketTransport
    found = [each for each in gc.get_objects() if type(each) is kind and each._loop is served.loop]
    return [each for each in found if each._sock is not None and each.get_extra_info("peername") == client]


@pytest.mark.parametrize("sent", [b'{"type": "describe"}\n' * 20_000, b'{"type": "describe"}\n' * 150 + b"x\n"])
@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux closes connections that take nothing")
def test_who_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Also when what is left for it is no more than the buffers hold."""
    monkeypatch.setattr(wyoming_events, "EVENT_S", 1.0)
    monkeypatch.setattr(stalled, "STALLED_S", 1.0)
    with serving() as served, socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.connect(("127.0.0.1", served.wyoming))
        own.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            own.send(sent)
        until(lambda: select.select([own], [], [], 0)[0])  # an answer has come, which stays there
        until(lambda: not connections(served, own))


def test_who_hangs_up_is_forgotten(served: Served) -> None:
    async def ask() -> None:
        for _ in range(10):
            async with connected(served) as client:
                await send(client, AudioStart(16_000, 2, 1), *chunks(sound(TIMER)))
                await following(client, VoiceStarted)
            async with connected(served) as client:
                await send(client, Transcript("Tell me a long story."))
        await asyncio.to_thread(until, lambda: served.desk.live == 0)

    asyncio.run(ask())
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "edge-gemma-job"])
    assert served.desk.queue.waiting == 0
