"""OpenAI's realtime transcription, by its own client and by plain websockets."""

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import openai
import pytest
import websockets
from websockets.typing import Origin, Subprotocol

from edge_gemma.audio.files import AudioFile
from edge_gemma.server import desk as desks
from edge_gemma.server import live
from edge_gemma.server.guard import Rules
from edge_gemma.server.turns import LIVE
from tests import ROOT
from tests.server.serving import Served, serving
from tests.waiting import until

TIMER = ROOT / "examples" / "timer.wav"
SPEECH = ROOT / "tests" / "speech"
HEARD = "conversation.item.input_audio_transcription"


def samples(path: Any, rate: int = 24_000, silence_s: float = 0.0) -> np.ndarray:
    """int16 [n] of a file."""
    import soxr

    with AudioFile(path) as file:
        sound = np.concatenate([*file, np.zeros(int(16_000 * silence_s), np.float32)])
    return (
        (soxr.resample(sound, 16_000, rate) * 32767).astype("<i2") if rate != 16_000 else (sound * 32767).astype("<i2")
    )


def appended(sound: np.ndarray, step: int = 2400) -> Iterable[dict[str, Any]]:
    for at in range(0, len(sound), step):
        data = base64.b64encode(sound[at : at + step].tobytes()).decode()
        yield {"type": "input_audio_buffer.append", "audio": data}


@contextlib.asynccontextmanager
async def connected(served: Served, query: str = "intent=transcription", **options: Any) -> AsyncIterator[Any]:
    async with websockets.connect(f"ws://127.0.0.1:{served.port}/v1/realtime?{query}", **options) as socket:
        yield socket


async def following(socket: Any, *last: str) -> list[dict[str, Any]]:
    """Events up to one of a kind."""
    events: list[dict[str, Any]] = []
    while not events or events[-1]["type"] not in last:
        events.append(json.loads(await asyncio.wait_for(socket.recv(), 60)))
    return events


async def update(socket: Any, **settings: Any) -> list[dict[str, Any]]:
    session = {"type": "transcription", "audio": {"input": settings}}
    await socket.send(json.dumps({"type": "session.update", "session": session, "event_id": "mine"}))
    return await following(socket, "session.updated", "error")


def test_the_client_of_openai(served: Served) -> None:
    """Speech in real time: its text streams, and is complete soon after the last word."""

    async def talk() -> tuple[list[Any], bool]:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any")
        sound = samples(TIMER, silence_s=15.0)
        events: list[Any] = []
        async with client, client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            await connection.session.update(
                session={
                    "type": "transcription",
                    "audio": {"input": {
                        "format": {"type": "audio/pcm", "rate": 24000},
                        "transcription": {"model": "demo", "language": "en"},
                        "turn_detection": {"type": "server_vad", "silence_duration_ms": 500, "threshold": 0.5},
                    }},
                }
            )  # fmt: skip

            async def speak() -> None:
                due = time.monotonic()
                for event in appended(sound):
                    due += 0.1
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    await connection.input_audio_buffer.append(audio=event["audio"])

            speaking = asyncio.create_task(speak())
            async for event in connection:
                events.append(event)
                if event.type == f"{HEARD}.completed":
                    break
            early = not speaking.done()
            speaking.cancel()
            return events, early

    events, early = asyncio.run(talk())
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == f"{HEARD}.delta"]
    assert kinds[:3] == ["session.created", "session.updated", "input_audio_buffer.speech_started"]
    rest = [kind for kind in kinds[3:] if kind != f"{HEARD}.delta"]
    assert rest == [
        "input_audio_buffer.speech_stopped", "input_audio_buffer.committed", "conversation.item.added",
        f"{HEARD}.completed",
    ]  # fmt: skip
    assert len(deltas) > 3
    assert "".join(deltas) == events[-1].transcript
    assert "timer" in events[-1].transcript.lower()
    assert events[-1].usage.type == "duration"
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    assert early, "it has waited for the end of the sound"


@pytest.mark.parametrize("rate", [24_000, 16_000])
def test_the_client_says_when(served: Served, rate: int) -> None:
    async def talk() -> list[dict[str, Any]]:
        async with connected(served) as socket:
            found = await update(socket, format={"type": "audio/pcm", "rate": rate}, turn_detection=None)
            assert found[-1]["session"]["audio"]["input"]["turn_detection"] is None
            for event in (*appended(samples(TIMER, rate)), *appended(samples(SPEECH / "09.flac", rate))):
                await socket.send(json.dumps(event))
            await socket.send('{"type": "input_audio_buffer.commit"}')
            first = await following(socket, f"{HEARD}.completed")
            for event in appended(samples(SPEECH / "02.flac", rate)):
                await socket.send(json.dumps(event))
            await socket.send('{"type": "input_audio_buffer.commit"}')
            return first + await following(socket, f"{HEARD}.completed")

    events = asyncio.run(talk())
    first, second = [event for event in events if event["type"] == f"{HEARD}.completed"]
    assert "timer" in first["transcript"].lower()
    assert "radio" in first["transcript"].lower()
    assert "time" in second["transcript"].lower()
    committed = [event for event in events if event["type"] == "input_audio_buffer.committed"]
    assert [event["previous_item_id"] for event in committed] == [None, first["item_id"]]
    for done in (first, second):
        told = [e["delta"] for e in events if e["type"] == f"{HEARD}.delta" and e["item_id"] == done["item_id"]]
        assert "".join(told) == done["transcript"]


def test_two_commits_at_once_keep_their_order(served: Served) -> None:
    async def talk() -> list[dict[str, Any]]:
        async with connected(served) as socket:
            await update(socket, turn_detection=None)
            for name in ("02", "09"):
                for event in appended(samples(SPEECH / f"{name}.flac"), 100_000):
                    await socket.send(json.dumps(event))
                await socket.send('{"type": "input_audio_buffer.commit"}')
            return await following(socket, f"{HEARD}.completed") + await following(socket, f"{HEARD}.completed")

    events = asyncio.run(talk())
    done = [event for event in events if event["type"] == f"{HEARD}.completed"]
    committed = [event["item_id"] for event in events if event["type"] == "input_audio_buffer.committed"]
    assert [event["item_id"] for event in done] == committed
    assert "time" in done[0]["transcript"].lower()
    assert "radio" in done[1]["transcript"].lower()


def test_times_count_from_the_beginning(served: Served) -> None:
    sound = samples(TIMER, silence_s=1.0)

    async def talk() -> list[dict[str, Any]]:
        async with connected(served) as socket:
            events = []
            for _ in range(2):
                for event in appended(sound):
                    await socket.send(json.dumps(event))
                events += await following(socket, f"{HEARD}.completed")
                await socket.send('{"type": "input_audio_buffer.commit"}')
                await following(socket, f"{HEARD}.completed")
            return events

    events = asyncio.run(talk())
    first, second = [e["audio_start_ms"] for e in events if e["type"] == "input_audio_buffer.speech_started"]
    ends = [e["audio_end_ms"] for e in events if e["type"] == "input_audio_buffer.speech_stopped"]
    assert second - first == pytest.approx(len(sound) / 24, abs=100)
    assert first < ends[0] < second < ends[1]


def test_cleared_sound_is_forgotten(served: Served) -> None:
    async def talk() -> list[dict[str, Any]]:
        async with connected(served) as socket:
            await update(socket, turn_detection=None)
            for event in appended(samples(TIMER)):
                await socket.send(json.dumps(event))
            await socket.send('{"type": "input_audio_buffer.clear"}')
            await socket.send('{"type": "input_audio_buffer.commit"}')
            empty = await following(socket, "error")
            for event in appended(samples(SPEECH / "09.flac")):
                await socket.send(json.dumps(event))
            await socket.send('{"type": "input_audio_buffer.commit"}')
            return empty + await following(socket, f"{HEARD}.completed")

    events = asyncio.run(talk())
    assert [e["type"] for e in events if "cleared" in e["type"]] == ["input_audio_buffer.cleared"]
    assert [e["error"]["code"] for e in events if e["type"] == "error"] == ["input_audio_buffer_commit_empty"]
    assert "timer" not in events[-1]["transcript"].lower()
    assert "radio" in events[-1]["transcript"].lower()


@pytest.mark.parametrize("before", [False, True])
def test_silence_that_is_committed_has_no_text(served: Served, before: bool) -> None:
    async def talk() -> list[dict[str, Any]]:
        async with connected(served) as socket:
            if before:
                for event in appended(samples(TIMER, silence_s=1.0)):
                    await socket.send(json.dumps(event))
                assert (await following(socket, f"{HEARD}.completed"))[-1]["transcript"]
            for event in appended(np.zeros(24_000, "<i2")):
                await socket.send(json.dumps(event))
            await socket.send('{"type": "input_audio_buffer.commit"}')
            return await following(socket, f"{HEARD}.completed")

    assert asyncio.run(talk())[-1]["transcript"] == ""


WRONG: list[tuple[str, str]] = [
    ("{", "JSON"), ("[]", "object"), ("{}", "event"), ('{"type": 5}', "type"), ('{"type": "x"}', "'x'"),
    ('{"type": "response.create"}', "not served"), ('{"type": "input_audio_buffer.append"}', "audio"),
    ('{"type": "input_audio_buffer.append", "audio": "%%"}', "base64"),
    ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "whole samples"),
    ('{"type": "input_audio_buffer.append", "audio": "\u00e4"}', "base64"),
    ('{"type": "input_audio_buffer.commit"}', "0.00 s"),
    ('{"type": "session.update", "session": {"type": "realtime"}}', "transcription"),
    ('{"type": "session.update", "session": {"include": ["x"]}}', "include"),
    ('{"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}}', "audio/pcm"),
    ('{"type": "session.update", "session": {"audio": {"input": {"format": {"rate": 44100}}}}}', "24000"),
    ('{"type": "session.update", "session": {"audio": {"input": {"transcription": {"model": "x"}}}}}', "no model"),
    ('{"type": "session.update", "session": {"audio": {"input": {"transcription": {"language": "xx"}}}}}', "language"),
    ('{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"type": "x"}}}}}', "server_vad"),
    ('{"type": "session.update", "session": {"audio": {"input": {"turn_detection": {"threshold": 7}}}}}', "0 to 1"),
]  # fmt: skip


def test_what_is_wrong_is_told_and_the_session_goes_on(served: Served) -> None:
    async def talk() -> None:
        async with connected(served) as socket:
            await following(socket, "session.created")
            for sent, told in WRONG:
                await socket.send(sent)
                error = (await following(socket, "error"))[-1]["error"]
                assert told in error["message"], (sent, error)
            await socket.send(b"\x00\x01")
            assert "binary" in (await following(socket, "error"))[-1]["error"]["message"]
            await socket.send('{"type": "nothing", "event_id": "e7"}')
            assert (await following(socket, "error"))[-1]["error"]["event_id"] == "e7"
            for event in appended(samples(TIMER)):
                await socket.send(json.dumps(event))
            await socket.send('{"type": "input_audio_buffer.commit"}')
            assert "timer" in (await following(socket, f"{HEARD}.completed"))[-1]["transcript"].lower()

    asyncio.run(talk())


@pytest.mark.parametrize(("query", "told"), [("intent=x", "intent"), ("model=gemma9", "gemma9")])
def test_what_cannot_be_served_is_told_before_the_end(served: Served, query: str, told: str) -> None:
    async def talk() -> None:
        async with connected(served, query) as socket:
            assert told in (await following(socket, "error"))[-1]["error"]["message"]
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008

    asyncio.run(talk())


def test_settings_change_between_utterances(served: Served) -> None:
    """What has come before them is heard as it was meant."""

    async def talk() -> tuple[str, str]:
        async with connected(served) as socket:
            for event in appended(samples(TIMER)):
                await socket.send(json.dumps(event))
            before = await update(socket, format={"type": "audio/pcm", "rate": 16_000}, turn_detection=None)
            first = next(e for e in before if e["type"] == f"{HEARD}.completed")["transcript"]
            for event in appended(samples(SPEECH / "09.flac", 16_000)):
                await socket.send(json.dumps(event))
            await socket.send('{"type": "input_audio_buffer.commit"}')
            return first, (await following(socket, f"{HEARD}.completed"))[-1]["transcript"]

    first, second = asyncio.run(talk())
    assert "timer" in first.lower()
    assert "radio" in second.lower()


def test_too_many_who_speak(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "MOST_LIVE", 0)

    async def talk() -> None:
        async with connected(served) as socket:
            await socket.send(json.dumps(next(iter(appended(samples(TIMER))))))
            assert (await following(socket, "error"))[-1]["error"]["code"] == "too_many_live"
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013

    asyncio.run(talk())


def test_who_falls_silent_gives_the_place_to_others(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "IDLE_S", 0.3)

    async def talk() -> None:
        async with connected(served) as socket:
            for _ in range(2):
                for event in appended(samples(TIMER)):
                    await socket.send(json.dumps(event))
                done = (await following(socket, f"{HEARD}.completed"))[-1]  # without a pause behind it
                assert "timer" in done["transcript"].lower()
                await asyncio.to_thread(until, lambda: served.desk.live == 0)

    asyncio.run(talk())


def test_a_commit_long_after_the_last_sound(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "IDLE_S", 0.3)

    async def talk() -> list[str]:
        async with connected(served) as socket:
            await update(socket, turn_detection=None)
            texts = []
            for _ in range(2):
                for event in appended(samples(TIMER)):
                    await socket.send(json.dumps(event))
                await following(socket, f"{HEARD}.delta")
                await asyncio.to_thread(until, lambda: served.desk.live == 0)
                await socket.send('{"type": "input_audio_buffer.commit"}')
                texts.append((await following(socket, f"{HEARD}.completed"))[-1]["transcript"])
            return texts

    assert all("timer" in text.lower() for text in asyncio.run(talk()))


@pytest.mark.parametrize("turns", [True, False])
def test_sound_that_comes_while_last_words_are_written(
    served: Served, monkeypatch: pytest.MonkeyPatch, turns: bool
) -> None:
    """Nothing has come for a while, so listening ends: who speaks on meanwhile is heard, too."""
    monkeypatch.setattr(live, "IDLE_S", 0.3)
    take, ending = live.Sound.take, threading.Event()

    def slow(self: live.Sound, stopping: threading.Event) -> Any:
        item = take(self, stopping)
        if item is live.Mark.END and not ending.is_set():
            ending.set()
            time.sleep(1.0)
        return item

    monkeypatch.setattr(live.Sound, "take", slow)

    async def talk() -> str:
        async with connected(served) as socket:
            if not turns:
                await update(socket, turn_detection=None)
            for said in range(2):
                for event in appended(samples(TIMER)):
                    await socket.send(json.dumps(event))
                if not said:
                    await asyncio.to_thread(ending.wait, 60)
            heard = ""
            if turns:
                heard = (await following(socket, f"{HEARD}.completed"))[-1]["transcript"]
            await socket.send('{"type": "input_audio_buffer.commit"}')
            return heard + (await following(socket, f"{HEARD}.completed"))[-1]["transcript"]

    assert asyncio.run(talk()).lower().count("timer") == 2


def test_who_hangs_up_is_forgotten(served: Served) -> None:
    async def talk() -> None:
        for _ in range(12):  # more than there are places
            async with connected(served) as socket:
                for event in appended(samples(TIMER)):
                    await socket.send(json.dumps(event))
                await following(socket, "input_audio_buffer.speech_started")
            await asyncio.to_thread(until, lambda: served.desk.live == 0)

    asyncio.run(talk())
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "edge-gemma-job"])


def test_speech_goes_before_what_was_asked(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer is being written: speech is heard meanwhile."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any")
    stream: Any = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "hello"}], stream=True, max_tokens=3000,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {
            "type": "array", "minItems": 2000, "items": {"type": "integer"},
        }}},
    )  # fmt: skip
    next(iter(stream))

    async def talk() -> str:
        async with connected(served) as socket:
            for event in appended(samples(TIMER, silence_s=1.0)):
                await socket.send(json.dumps(event))
            return (await following(socket, f"{HEARD}.completed"))[-1]["transcript"]

    ranks = set()
    turn = served.desk.turns.turn

    def seen(rank: int, stopping: threading.Event) -> Any:
        ranks.add(rank)
        return turn(rank, stopping)

    monkeypatch.setattr(served.desk.turns, "turn", seen)
    assert "timer" in asyncio.run(talk()).lower()
    assert ranks == {LIVE}
    assert served.desk.queue.free == 0, "the answer was over before: the test says nothing"
    stream.close()
    client.close()


def test_keys_and_origins(served: Served) -> None:
    async def status(port: int, **options: Any) -> int | str | None:
        try:
            async with websockets.connect(f"ws://127.0.0.1:{port}/v1/realtime", **options) as socket:
                return socket.subprotocol or 101
        except websockets.InvalidStatus as error:
            return error.response.status_code

    key = Subprotocol("openai-insecure-api-key.secret")
    assert asyncio.run(status(served.port, origin=Origin("https://evil.example"))) == 403
    assert asyncio.run(status(served.port, origin=Origin(f"http://127.0.0.1:{served.port}"))) == 101
    with serving(rules=Rules(key="secret")) as locked:
        assert asyncio.run(status(locked.port)) == 403
        assert asyncio.run(status(locked.port, subprotocols=[Subprotocol("realtime")])) == 403
        assert asyncio.run(status(locked.port, subprotocols=[Subprotocol("realtime"), key])) == "realtime"
        assert asyncio.run(status(locked.port, subprotocols=[key])) == key
        assert asyncio.run(status(locked.port, additional_headers={"Authorization": "Bearer secret"})) == 101
        wrong = Subprotocol("openai-insecure-api-key.other")
        assert asyncio.run(status(locked.port, subprotocols=[Subprotocol("realtime"), wrong])) == 403
