"""Speaking to the page: Chromium's fake microphone hears examples/timer.wav."""

import asyncio
import base64
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from edge_gemma.server import run
from edge_gemma.server.guard import Rules
from tests.server.browser import Tab
from tests.server.serving import Served, serving

TRANSCRIPTION = "conversation.item.input_audio_transcription"


class Recorder:
    """Live speech in the server's place: takes all sound, and says what it is told to say."""

    def __init__(self) -> None:
        self.sessions: list[dict[str, Any]] = []
        self.sound = bytearray()
        self.protocols: list[str] = []
        self.finals = ["Set a timer", "for ten minutes."]
        self.failing = False

    async def talk(self, socket: WebSocket) -> None:
        self.protocols = socket.scope["subprotocols"]
        await socket.accept("realtime")
        with contextlib.suppress(WebSocketDisconnect):
            await self._talk(socket)

    async def _talk(self, socket: WebSocket) -> None:
        told = False
        while True:
            event = await socket.receive_json()
            if event["type"] == "session.update":
                self.sessions.append(event["session"])
                await socket.send_json({"type": "session.updated"})
            elif event["type"] == "input_audio_buffer.append":
                self.sound += base64.b64decode(event["audio"], validate=True)
                if not told and len(self.sound) > 32000:
                    told = True
                    await self._say(socket, "one", self.finals[0])
                    await self._begin(socket, "two", self.finals[1])
            elif event["type"] == "input_audio_buffer.commit":
                await socket.send_json({"type": "input_audio_buffer.committed", "item_id": "two"})
                await asyncio.sleep(0.2)
                if self.failing:
                    error = {"message": "nothing was understood"}
                    await socket.send_json({"type": f"{TRANSCRIPTION}.failed", "item_id": "two", "error": error})
                else:
                    final = {"type": f"{TRANSCRIPTION}.completed", "item_id": "two", "transcript": self.finals[1]}
                    await socket.send_json(final)

    async def _begin(self, socket: WebSocket, item: str, text: str) -> None:
        await socket.send_json({"type": "input_audio_buffer.speech_started", "item_id": item, "audio_start_ms": 0})
        for part in text.split(" ")[:2]:
            await socket.send_json({"type": f"{TRANSCRIPTION}.delta", "item_id": item, "delta": f"{part} "})

    async def _say(self, socket: WebSocket, item: str, text: str) -> None:
        await self._begin(socket, item, text)
        await socket.send_json({"type": "input_audio_buffer.committed", "item_id": item})
        await socket.send_json({"type": f"{TRANSCRIPTION}.completed", "item_id": item, "transcript": text})


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder, application = Recorder(), run.application

    def with_recorder(*given: Any) -> Any:
        app = application(*given)
        app.router.routes.insert(0, WebSocketRoute("/v1/realtime", recorder.talk))
        return app

    monkeypatch.setattr(run, "application", with_recorder)
    return recorder


@pytest.fixture
def page(tab: Tab, recorder: Recorder) -> Iterator[Tab]:
    with serving(rules=Rules("sesame")) as served:
        tab.send("Page.navigate", url=f"{served.url}/")
        tab.wait("document.querySelector('#door')?.open")
        tab.type("sesame")
        tab.press("Enter")
        tab.wait("document.querySelector('#model option')")
        yield tab


def test_words_are_written_while_they_are_spoken(page: Tab, recorder: Recorder) -> None:
    page.click("#box")
    page.type("Please:")
    page.click("#microphone")
    page.wait("document.querySelector('#box').value === 'Please: Set a timer for ten'")
    assert page.run("[microphone.ariaPressed, box.readOnly]") == ["true", True]
    page.click("#microphone")
    page.wait("!document.querySelector('#box').readOnly")
    assert page.run("box.value") == "Please: Set a timer for ten minutes."
    assert page.run("microphone.ariaPressed") == "false"
    assert recorder.protocols == ["realtime", "openai-insecure-api-key.sesame"]
    input_ = recorder.sessions[0]["audio"]["input"]
    assert input_["format"] == {"type": "audio/pcm", "rate": 16000}
    assert input_["transcription"] == {"model": "demo"}
    heard = np.frombuffer(bytes(recorder.sound), "<i2")
    assert len(heard) > 16000
    assert np.abs(heard).max() > 1000, "silence"


def test_sending_ends_the_microphone(page: Tab, recorder: Recorder) -> None:
    page.click("#microphone")
    page.wait("document.querySelector('#box').value === 'Set a timer for ten'")
    page.run("box.focus()")
    page.press("Enter")
    page.wait("document.querySelector('.bubble')?.textContent === 'Set a timer for ten'")
    page.wait("!document.querySelector('#box').readOnly")
    assert page.run("box.value") == "", "late words are not written into the next message"


def test_what_is_not_understood(page: Tab, recorder: Recorder) -> None:
    recorder.failing = True
    page.click("#microphone")
    page.wait("document.querySelector('#box').value")
    page.click("#microphone")
    page.wait("!document.querySelector('#box').readOnly")
    assert page.run("told.textContent") == "nothing was understood"
    assert page.run("box.value") == "Set a timer for ten", "what was heard stays"


def test_a_server_without_live_speech(tab: Tab, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    tab.open(f"{served.url}/")
    tab.run("window.WebSocket = class extends EventTarget { constructor() { super(); this.readyState = 3;"
            " setTimeout(() => this.onerror()) } close() {} }")  # fmt: skip
    tab.click("#microphone")
    tab.wait("document.querySelector('#told').textContent.includes('does not take live speech')")
    assert tab.run("[microphone.ariaPressed, box.readOnly]") == ["false", False]


def test_a_page_that_may_not_have_the_microphone(tab: Tab, served: Served) -> None:
    """Browsers give it to no page of http in the network."""
    tab.open(f"{served.url}/")
    tab.run("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
    tab.click("#microphone")
    tab.wait("document.querySelector('#told').textContent.includes('https')")
    assert tab.run("box.readOnly") is False


def test_the_server_hears_the_microphone(tab: Tab, served: Served) -> None:
    tab.open(f"{served.url}/")
    tab.click("#microphone")
    tab.wait("/timer/i.test(document.querySelector('#box').value)")
    early = tab.run("box.value")
    tab.click("#microphone")
    tab.wait("!document.querySelector('#box').readOnly", seconds=10)
    assert "ten minutes" in tab.run("box.value").lower()
    assert len(early) <= len(tab.run("box.value"))
    assert tab.run("notice.hidden")
    tab.click("#microphone")
    tab.click("#microphone")  # while it is being opened
    assert tab.run("microphone.ariaPressed") == "true"
    tab.wait("!document.querySelector('#box').readOnly", seconds=10)


def test_the_server_stops_listening_when_the_page_is_left(tab: Tab, served: Served) -> None:
    tab.open(f"{served.url}/")
    tab.click("#microphone")
    tab.wait("document.querySelector('#box').value")
    assert served.desk.live == 1
    tab.open(f"{served.url}/")
    end = time.monotonic() + 10
    while served.desk.live:
        assert time.monotonic() < end, "the server still listens"
        time.sleep(0.02)
