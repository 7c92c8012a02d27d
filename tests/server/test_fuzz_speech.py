"""Whatever is sent to the doors that hear: one clear outcome each, and the server lives on."""

import asyncio
import base64
import contextlib
import json
import logging
import socket
from typing import Any

import pytest
import websockets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.serving import Served
from tests.waiting import until

FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from(["<start_of_turn>", "\x00", "audio/pcm", "server_vad", "demo", "en"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
SOUND = st.binary(max_size=5000)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """Fails if the server has logged an error of its own."""
    caplog.set_level(logging.INFO)
    yield
    wrong = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not wrong, [record.getMessage() for record in wrong]


# Wyoming

WYOMING_KINDS = st.sampled_from(
    ["describe", "ping", "transcribe", "audio-start", "audio-chunk", "audio-stop", "transcript", "synthesize", "info"]
) | st.text(max_size=12)
FORMS = st.fixed_dictionaries(
    {"rate": st.sampled_from([16000, 48000, 8000, 7, 10**9]), "width": st.integers(0, 5), "channels": st.integers(0, 9)}
)
DATA = FORMS | st.dictionaries(
    st.sampled_from(["text", "language", "name", "context", "rate", "vad_sensitivity"]), VALUES
) | st.just({"rate": 16000, "width": 2, "channels": 1})  # fmt: skip


@st.composite
def wyoming_events(draw: st.DrawFn) -> bytes:
    """An event in form; now and then its lengths lie."""
    kind, data, payload = draw(WYOMING_KINDS), draw(DATA | VALUES), draw(SOUND | st.just(b""))
    inline = draw(st.booleans())
    text = json.dumps(data).encode()
    head: dict[str, Any] = {"type": kind, "version": "1.10.2"}
    if inline:
        head["data"], text = data, b""
    else:
        head["data_length"] = draw(st.just(len(text)) | st.integers(-1, 2**40))
    if payload:
        head["payload_length"] = draw(st.just(len(payload)) | st.integers(-1, 2**40) | VALUES)
    return json.dumps(head).encode() + b"\n" + text + payload


def wyoming(served: Served, sent: bytes) -> bytes:
    """What comes back until the server ends the connection, which has no more to send."""
    with socket.create_connection(("127.0.0.1", served.wyoming), timeout=30) as connection:
        found = b""
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(1 << 16):
                found += data
        return found


@FUZZ
@given(sent=st.lists(wyoming_events() | st.binary(max_size=200), max_size=6).map(b"".join))
def test_wyoming(served: Served, quiet: None, sent: bytes) -> None:
    found = wyoming(served, sent)
    assert b"Traceback" not in found
    while found:
        line, _, found = found.partition(b"\n")
        head = json.loads(line)
        assert head["type"]
        data, found = found[: head.get("data_length", 0)], found[head.get("data_length", 0) :]
        assert not data or isinstance(json.loads(data), dict)
    with socket.create_connection(("127.0.0.1", served.wyoming), timeout=30) as connection:
        connection.sendall(b'{"type": "ping"}\n')
        assert json.loads(connection.recv(1000).partition(b"\n")[0])["type"] == "pong"


# Realtime

REALTIME_KINDS = st.sampled_from(
    ["session.update", "input_audio_buffer.append", "input_audio_buffer.commit", "input_audio_buffer.clear"]
)
INPUTS = st.dictionaries(
    st.sampled_from(["format", "transcription", "turn_detection", "noise_reduction"]),
    st.dictionaries(
        st.sampled_from(["type", "rate", "language", "model", "threshold", "silence_duration_ms", "eagerness"]),
        VALUES | st.sampled_from([24000, 16000, "audio/pcm", "server_vad", "semantic_vad", "en", "demo", 0.3, 500]),
    ) | VALUES,
)  # fmt: skip
SESSIONS = st.fixed_dictionaries({"audio": st.fixed_dictionaries({"input": INPUTS})}) | VALUES
EVENTS = st.fixed_dictionaries(
    {"type": REALTIME_KINDS | VALUES},
    optional={
        "audio": SOUND.map(lambda data: base64.b64encode(data).decode()) | VALUES,
        "session": SESSIONS,
        "event_id": VALUES,
    },
)  # fmt: skip
MESSAGES = EVENTS.map(json.dumps) | VALUES.map(json.dumps) | st.text(max_size=50) | st.binary(max_size=50)


async def realtime(served: Served, messages: list[str | bytes]) -> list[dict[str, Any]]:
    """What comes back, up to the answer to a last event that nobody knows."""
    found = []
    async with websockets.connect(f"ws://127.0.0.1:{served.port}/v1/realtime?intent=transcription") as socket_:
        for message in messages:
            await socket_.send(message)
        await socket_.send('{"type": "the last one", "event_id": "last"}')
        while not found or found[-1].get("error", {}).get("event_id") != "last":
            found.append(json.loads(await asyncio.wait_for(socket_.recv(), 30)))
    return found


@FUZZ
@given(messages=st.lists(MESSAGES, max_size=8))
def test_realtime(served: Served, quiet: None, messages: list[str | bytes]) -> None:
    found = asyncio.run(realtime(served, messages))
    assert found[0]["type"] == "session.created"
    assert all(event["event_id"] for event in found)
    errors = [event["error"] for event in found if event["type"] == "error"]
    assert all(error["message"] and "Traceback" not in error["message"] for error in errors)
    until(lambda: served.desk.live == 0, 10)


# Forms

FIELDS = st.dictionaries(
    st.sampled_from(["model", "language", "languages[]", "response_format", "stream", "temperature"])
    | st.text(max_size=8),
    st.text(max_size=20) | st.sampled_from(["demo", "json", "vtt", "true", "0", "en"]),
    max_size=4,
)  # fmt: skip


@FUZZ
@given(fields=FIELDS, file=st.binary(max_size=500), name=st.text(max_size=20), cut=st.integers(0, 200))
def test_forms(served: Served, quiet: None, fields: dict[str, str], file: bytes, name: str, cut: int) -> None:
    import httpx

    request = httpx.Request("POST", "http://x/", data=fields, files={"file": (name, file)})
    body = request.read()
    body = body[: len(body) - cut] if cut < len(body) else body
    answer = httpx.post(
        f"{served.url}/v1/audio/transcriptions", content=body, headers={"Content-Type": request.headers["content-type"]}
    )
    assert 400 <= answer.status_code < 500, answer.text  # a few random bytes are no sound
    assert answer.json()["error"]["message"]
