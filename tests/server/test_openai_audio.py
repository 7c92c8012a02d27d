"""OpenAI's transcriptions, read by its own client; forms that are wrong."""

import io
import json
import re
import socket
import threading
import time
import wave
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from edge_gemma.server import uploads
from tests import ROOT
from tests.server.serving import Served
from tests.waiting import until

TIMER = ROOT / "examples" / "timer.wav"
SAID = "set a timer for ten minutes"
SPEECH = ROOT / "tests" / "speech"


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def long_wav() -> bytes:
    """Several commands, one after another: about half a minute."""
    from edge_gemma.audio.files import AudioFile

    parts: list[np.ndarray] = []
    for number in range(1, 9):
        with AudioFile(SPEECH / f"{number:02}.flac") as file:
            parts += [*file, np.zeros(16_000 * 2, np.float32)]
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((np.concatenate(parts) * 32767).astype("<i2").tobytes())
    return out.getvalue()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def test_a_text(client: openai.OpenAI) -> None:
    answer = client.audio.transcriptions.create(model="demo", file=TIMER)
    assert words(answer.text) == words(SAID) or answer.text == "Set a timer for 10 minutes."
    assert answer.usage is not None
    assert answer.usage.type == "duration"
    assert answer.usage.seconds >= 2


@pytest.mark.parametrize("model", ["demo", "demo:latest", "whisper-1", "gpt-4o-mini-transcribe"])
def test_names_of_models(client: openai.OpenAI, model: str) -> None:
    assert "timer" in client.audio.transcriptions.create(model=model, file=TIMER, language="en").text.lower()


def test_subtitles(client: openai.OpenAI) -> None:
    plain: Any = client.audio.transcriptions.create(model="demo", file=TIMER, response_format="text")
    srt: Any = client.audio.transcriptions.create(model="demo", file=TIMER, response_format="srt")
    vtt: Any = client.audio.transcriptions.create(model="demo", file=TIMER, response_format="vtt")
    assert re.fullmatch(r"1\n00:00:00,\d{3} --> 00:00:0\d,\d{3}\n[^\n]+\n\n", srt)
    assert re.fullmatch(r"WEBVTT\n\n00:00:00\.\d{3} --> 00:00:0\d\.\d{3}\n[^\n]+\n\n", vtt)
    assert plain.strip() in srt
    assert plain.strip() in vtt


def test_segments(client: openai.OpenAI, long_wav: bytes) -> None:
    whole = client.audio.transcriptions.create(
        model="demo", file=("x.wav", long_wav), response_format="verbose_json", timestamp_granularities=["segment"],
        temperature=0, prompt="kitchen", language="en",
    )  # fmt: skip
    assert whole.segments is not None
    assert len(whole.segments) == 8
    assert whole.language == "english"
    assert whole.text == " ".join(segment.text for segment in whole.segments)
    starts = [segment.start for segment in whole.segments]
    assert starts == sorted(starts)
    assert whole.segments[-1].end <= whole.duration


def test_a_stream_comes_as_segments_are_final(client: openai.OpenAI, long_wav: bytes) -> None:
    whole = client.audio.transcriptions.create(model="demo", file=("x.wav", long_wav))
    events, times = [], [time.monotonic()]
    for event in client.audio.transcriptions.create(model="demo", file=("x.wav", long_wav), stream=True):
        events.append(event)
        times.append(time.monotonic())
    assert [event.type for event in events] == ["transcript.text.delta"] * 8 + ["transcript.text.done"]
    done: Any = events[-1]
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == done.text == whole.text
    assert done.usage.seconds >= 20
    assert times[1] - times[0] < 0.8 * (times[-1] - times[0]), "all came at once"


@pytest.mark.filterwarnings("ignore:deprecated")  # OpenAI retires its own model
def test_a_translation(client: openai.OpenAI) -> None:
    """The demonstration model has not learned to translate: only the form is right."""
    answer: Any = client.audio.translations.create(model="demo", file=TIMER, response_format="verbose_json")
    assert (answer.language, answer.task) == ("english", "translate")
    assert isinstance(answer.text, str)


FORM = {"model": "demo"}
SOUND: dict[str, Any] = {"file": ("timer.wav", TIMER.read_bytes())}
WRONG: list[tuple[dict[str, Any], dict[str, Any], int, str]] = [
    ({"response_format": "diarized_json"}, SOUND, 400, "speakers"),
    ({"response_format": "xml"}, SOUND, 400, "response_format"),
    ({"response_format": "srt", "stream": "true"}, SOUND, 400, "json beside stream"),
    ({"include[]": "logprobs"}, SOUND, 400, "include"),
    ({"timestamp_granularities[]": "word"}, SOUND, 400, "words"),
    ({"language": "xx"}, SOUND, 400, "language"),
    ({"temperature": "hot"}, SOUND, 400, "temperature"),
    ({"stream": "perhaps"}, SOUND, 400, "stream"),
    ({"model": "gemma9"}, SOUND, 404, "gemma9"),
    ({}, {"file": ("x.wav", b"no sound at all")}, 400, "not a sound file"),
    ({}, {"file": ("x.wav", b"")}, 400, "empty"),
    ({}, {"sound": ("x.wav", b"RIFF")}, 400, "file is missing"),
    ({"file": "text"}, {"other": ("x.wav", b"RIFF")}, 400, "file is missing"),
    ({"prompt": "x" * 100_000}, SOUND, 400, "form"),
    ({str(n): "x" for n in range(200)}, SOUND, 400, "form"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "files", "status", "told"), WRONG)
def test_what_is_wrong_is_said(
    served: Served, fields: dict[str, Any], files: dict[str, Any], status: int, told: str
) -> None:
    answer = httpx.post(f"{served.url}/v1/audio/transcriptions", data=FORM | fields, files=files, timeout=60)
    assert answer.status_code == status, answer.text
    assert told in answer.json()["error"]["message"]
    assert "/" not in answer.json()["error"]["message"].replace("multipart/form-data", ""), "a path of this machine"


def test_bodies_that_are_no_form(served: Served) -> None:
    url = f"{served.url}/v1/audio/transcriptions"
    assert httpx.post(url, json={"file": "x"}).status_code == 400
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x"):
        answer = httpx.post(url, content=b"--x\r\nrubbish", headers={"Content-Type": kind})
        assert answer.status_code == 400, kind


def endless(length: int) -> Iterator[bytes]:
    yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    for _ in range(length):
        yield bytes(1 << 16)


def test_a_size_counts_while_it_arrives(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "UPLOAD_BYTES", 1 << 20)
    url, head = f"{served.url}/v1/audio/transcriptions", {"Content-Type": "multipart/form-data; boundary=x"}
    assert httpx.post(url, content=endless(64), headers=head, timeout=60).status_code == 413
    declared = head | {"Content-Length": str(2 << 20)}
    assert httpx.post(url, content=bytes(2 << 20), headers=declared, timeout=60).status_code == 413


def test_too_many_files(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    url, sent = f"{served.url}/v1/audio/transcriptions", {"data": FORM, "files": SOUND}
    with monkeypatch.context() as small:
        small.setattr(uploads, "_LEAST_BYTES", uploads.KEPT_BYTES // 2 + 1)
        answer = httpx.post(url, **sent)
    assert answer.status_code == 429
    assert answer.headers["retry-after"]
    monkeypatch.setattr(uploads, "_LEAST_BYTES", 512 << 20)
    assert [httpx.post(url, **sent, timeout=60).status_code for _ in range(2)] == [200, 200], "the first has given back"
    monkeypatch.setattr(uploads, "UPLOAD_BYTES", 2 << 30)
    monkeypatch.setattr(uploads, "_LEAST_BYTES", (512 << 20) - (1 << 20))
    head = {"Content-Type": "multipart/form-data; boundary=x"}
    assert httpx.post(url, content=endless(uploads._LEAST_BYTES >> 16), headers=head, timeout=60).status_code == 400


def silence(seconds: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8_000)
        file.writeframes(b"\x80" * 8_000 * seconds)
    return out.getvalue()


@pytest.mark.parametrize(("words", "seconds"), [(True, 0.1), (False, 0.7)])
def test_who_hangs_up_ends_the_work(served: Served, long_wav: bytes, words: bool, seconds: float) -> None:
    """seconds: after which it does. All of the silence takes half a minute."""
    head, body = _request(long_wav if words else silence(2400))
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head + body)
        until(_working)
        time.sleep(seconds)
        assert _working()
    until(lambda: not _working(), 10)
    answer = httpx.post(f"{served.url}/v1/audio/transcriptions", data=FORM, files=SOUND, timeout=60)
    assert answer.status_code == 200


def _request(sound: bytes) -> tuple[bytes, bytes]:
    request = httpx.Request("POST", "http://x/", data=FORM, files={"file": ("x.wav", sound)})
    body = request.read()
    kind = request.headers["content-type"]
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode(), body


def _working() -> bool:
    return any(thread.name == "edge-gemma-job" for thread in threading.enumerate())


def test_an_error_in_a_stream(served: Served) -> None:
    """A file that ends in rubbish after a while is told in the stream, or before it."""
    files = {"file": ("x.wav", b"RIFF\xff\xff\xff\xffWAVEfmt " + bytes(100))}
    answer = httpx.post(f"{served.url}/v1/audio/transcriptions", data=FORM | {"stream": "true"}, files=files)
    assert answer.status_code == 400
    assert json.loads(answer.text)["error"]["message"]
