"""Sound files that lie about themselves, or would explode: an answer or one line, and the server lives on."""

import base64
import io
import struct
from typing import Any

import av
import httpx
import numpy as np
import pytest

from edge_gemma.server import openai_audio
from tests import ROOT
from tests.audio.test_indexes import MANY, file, fragments, track
from tests.server.serving import Served

FILES = "/v1/audio/transcriptions"
SECOND = bytes(32_000)


def wav(
    channels: int = 1, rate: int = 16_000, bits: int = 16, *, data: bytes = SECOND, size: int | None = None,
    align: int | None = None, mask: int | None = None,
) -> bytes:  # fmt: skip
    """A second of silence. size: what the head says instead of it. mask: of channels, in the extensible form."""
    align = channels * bits // 8 & 0xFFFF if align is None else align
    form = struct.pack("<HHIIHH", 1 if mask is None else 0xFFFE, channels, rate, rate * align & 0xFFFFFFFF, align, bits)
    if mask is not None:
        form += struct.pack("<HHI", 22, bits, mask) + bytes.fromhex("0100000000001000800000aa00389b71")
    size = len(data) if size is None else size
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", min(len(head) + size, 0xFFFFFFFF)) + head + data


def silent_video() -> bytes:
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode(None))
    return written.getvalue()


WAV = (ROOT / "examples" / "timer.wav").read_bytes()
LIARS = {
    "no size": (wav(size=0), 200), "no end": (wav(size=0xFFFFFFFF), 200), "align": (wav(align=0), 200),
    "mask": (wav(2, mask=0xFFFFFFFF), 200), "no mask": (wav(2, mask=0), 200), "odd": (wav(data=SECOND + b"x"), 200),
    "channels": (wav(65_535, data=SECOND * 9), 400), "no channels": (wav(0), 400), "1 Hz": (wav(rate=1), 400),
    "0 Hz": (wav(rate=0), 400), "4 GHz": (wav(rate=0xFFFFFFFF), 400), "bits": (wav(bits=65_535), 400),
    "no bits": (wav(bits=0), 400), "head": (wav()[:30], 400), "cut": (WAV[: len(WAV) // 2], 200),
    "garbage": (bytes(range(256)) * 100, 400), "zeros": (bytes(10_000), 400), "video": (silent_video(), 400),
    "index": (file(track(MANY)), 400), "fragments": (fragments(MANY // 500, 500), 400),
}  # fmt: skip


@pytest.fixture(scope="module")
def web(served: Served) -> Any:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("name", LIARS)
def test_a_file_that_lies(web: httpx.Client, name: str) -> None:
    data, status = LIARS[name]
    answer = web.post(FILES, files={"file": ("it.wav", data)}, data={"model": "demo"})
    assert answer.status_code == status, answer.text
    if status != 200:
        told = answer.json()["error"]["message"]
        assert len(told) < 200
        assert "\n" not in told
        assert "/" not in told, "no path of ours"


@pytest.mark.parametrize("name", LIARS)
def test_a_sound_of_a_chat_that_lies(web: httpx.Client, name: str) -> None:
    data, status = LIARS[name]
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    asked = {"messages": [{"role": "user", "content": [sound]}], "max_tokens": 1}
    answer = web.post("/v1/chat/completions", json=asked)
    assert answer.status_code == status, answer.text


def test_silence_without_end_gives_its_seat_back(web: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of it are a few kilobytes."""
    monkeypatch.setattr(openai_audio, "LONGEST_S", 3.0)
    for seconds, status in ((2, 200), (9, 413)):
        answer = web.post(FILES, files={"file": ("it.wav", wav(data=SECOND * seconds))}, data={"model": "demo"})
        assert answer.status_code == status, answer.text
    assert "longer than" in answer.json()["error"]["message"]
