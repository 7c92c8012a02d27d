"""OpenAI's realtime transcription: sound comes in over a websocket, text goes out while it is spoken.

Owns: the socket, the client's events, items and their order. Does not know: settings (realtime_session.py), how speech
is heard (live.py).
"""

import asyncio
import base64
import binascii
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from edge_gemma.audio.events import Event
from edge_gemma.server.bodies import Fields, json_fields
from edge_gemma.server.desk import Desk
from edge_gemma.server.guard import KEY_PROTOCOL, openai_error
from edge_gemma.server.live import Live, Mark, Marked, Sound, Written
from edge_gemma.server.openai_audio import speech_model
from edge_gemma.server.realtime_session import Session, refused_event
from edge_gemma.server.refusals import Refusal, refusal_of
from edge_gemma.server.streams import compact
from edge_gemma.server.transcription_body import usage

IDLE_S = 600.0  # without a message from the client, after which the socket is closed
_SEND_S = 20.0  # in which a client has to take an event
_LEAST_S = 0.1  # seconds of sound that can be committed
_GONE, _WRONG, _LATER = 1000, 1008, 1013


class Realtime:
    """The endpoint /v1/realtime."""

    def __init__(self, desk: Desk, live: Live) -> None:
        self._desk, self._live = desk, live

    def routes(self) -> list[WebSocketRoute]:
        """The routes of this protocol."""
        return [WebSocketRoute("/v1/realtime", self.realtime)]

    async def realtime(self, socket: WebSocket) -> None:
        """A session, until one side ends it."""
        await socket.accept(_protocol(socket.scope.get("subprotocols", [])))
        connection = _Connection(socket, self._desk, self._live)
        with suppress(WebSocketDisconnect, TimeoutError):
            await connection.run()


def _protocol(offered: list[str]) -> str | None:
    """The one that is spoken. A browser that has offered some hangs up if none of them is taken."""
    return "realtime" if "realtime" in offered else next((p for p in offered if p.startswith(KEY_PROTOCOL)), None)


class _Items:
    """The names of utterances, and what was written of the first one."""

    def __init__(self) -> None:
        self._names: deque[str] = deque()  # of utterances whose text is not complete
        self._open = False  # whether the last one still grows
        self.last: str | None = None
        self.written = Written()

    def growing(self) -> str:
        """The utterance that sound is added to now."""
        if not self._open:
            self._names.append(_name("item"))
            self._open = True
        return self._names[-1]

    def close(self) -> str:
        """That utterance is complete."""
        name, self._open = self.growing(), False
        return name

    @property
    def first(self) -> str:
        """The utterance that text comes for."""
        return self._names[0] if self._names else self.growing()

    def done(self) -> str:
        """The text of the first one is complete."""
        name, self.written = self.first, Written()
        self._names.popleft()
        self._open = self._open and bool(self._names)
        return name


class _Connection:
    """One client."""

    def __init__(self, socket: WebSocket, desk: Desk, live: Live) -> None:
        self._socket, self._desk, self._live = socket, desk, live
        self._name = _name("sess")
        query = Fields(dict(socket.query_params))
        self._intent = query.text("intent", "transcription")
        self._session = Session(model=query.text("model"))
        self._items = _Items()
        self._sound: Sound | None = None
        self._listening: asyncio.Task[None] | None = None
        self._sent = 0  # samples since the last commit
        self._commits: deque[bool] = deque()  # for each whose turn has not come: whether a segment was told since

    async def run(self) -> None:
        """Serve it. Raises WebSocketDisconnect when the client has gone, TimeoutError for one that takes nothing."""
        try:
            if self._intent != "transcription":
                told = f"intent is {self._intent!r:.40}, expected transcription"
                await self._close(Refusal(400, told, code="invalid_value", param="intent"))
                return
            self._session.wanted(speech_model(self._desk, self._session.model))
            await self._send("session.created", session=self._session.told(self._name))
            await self._read()
        except Refusal as refusal:
            await self._close(refusal)
        except (WebSocketDisconnect, TimeoutError):
            raise
        except Exception as error:
            await self._close(refusal_of(error))
        finally:
            await self._stop()

    async def _read(self) -> None:
        reading: asyncio.Task[Any] | None = None
        try:
            while True:
                reading = reading or asyncio.ensure_future(self._socket.receive())
                tasks = {reading, self._listening} if self._listening else {reading}
                await asyncio.wait(tasks, timeout=IDLE_S, return_when=asyncio.FIRST_COMPLETED)
                if self._listening is not None and self._listening.done():
                    await self._over()
                elif not reading.done():
                    raise Refusal(408, "nothing has come for ten minutes", code="idle")
                if reading.done():
                    message, reading = reading.result(), None
                    await self._take(message)
        finally:
            if reading is not None:
                reading.cancel()

    async def _over(self) -> None:
        """Listening has ended. What came too late for it is listened to anew. Raises its error."""
        listening, self._listening = self._listening, None
        sound, self._sound = self._sound, None
        if listening is not None:
            await listening
        for item in sound.left if sound is not None else ():
            if isinstance(item, Mark):
                await self._mark(item, 0.0)
            else:
                await self._heard().put(item)

    async def _take(self, message: Any) -> None:
        """A message of the client. What is wrong with it is told, and the session goes on."""
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or _GONE)
        event: Fields | None = None
        try:
            if message.get("text") is None:
                raise Refusal(400, "a binary message has come, expected events in JSON", code="invalid_event")
            event = json_fields(message["text"])
            await self._event(event)
        except (WebSocketDisconnect, TimeoutError):
            raise
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status >= 500:
                raise
            index = event.values.get("event_id") if event is not None else None
            await self._error(refusal, index if isinstance(index, str) else None)

    async def _event(self, event: Fields) -> None:
        kind = event.text("type", "")
        if kind == "input_audio_buffer.append":
            await self._append(event)
        elif kind == "input_audio_buffer.commit":
            await self._commit()
        elif kind == "input_audio_buffer.clear":
            await self._clear()
        elif kind == "session.update":
            session = self._session.updated(event.object("session") or Fields({}))
            session.wanted(speech_model(self._desk, session.model))
            if session != self._session:
                await self._finish()
            self._session = session
            await self._send("session.updated", session=session.told(self._name))
        else:
            raise refused_event(kind)

    async def _append(self, event: Fields) -> None:
        samples = _samples(event)
        sound = self._heard()
        self._sent += len(samples)
        if len(samples):
            await sound.put(samples)

    def _heard(self) -> Sound:
        """Where sound goes that is listened to, from now on if nothing was."""
        if self._sound is None:
            self._sound = Sound(self._session.rate)
            self._listening = asyncio.create_task(self._listen(self._sound, self._session))
        return self._sound

    async def _commit(self) -> None:
        if self._sent < _LEAST_S * self._session.rate:
            told = f"the buffer has {self._sent / self._session.rate:.2f} s of sound, expected {_LEAST_S} or more"
            raise Refusal(400, told, code="input_audio_buffer_commit_empty")
        seconds = self._sent / self._session.rate
        self._sent = 0
        self._commits.append(False)
        if self._session.vad is None:
            await self._committed(self._items.close())
        await self._mark(Mark.COMMIT, seconds)

    async def _clear(self) -> None:
        if self._sent:
            self._sent = 0
            if self._session.vad is None:
                self._items.close()
            await self._mark(Mark.CLEAR, 0.0)
        await self._send("input_audio_buffer.cleared")

    async def _mark(self, mark: Mark, seconds: float) -> None:
        """Say something about the sound so far. Its turn has come if all of it was heard."""
        if self._sound is not None:
            self._sound.mark(mark)
        elif mark is not Mark.END:
            await self._tell(self._session)(Marked(mark, seconds))

    def _tell(self, session: Session) -> Callable[[Event | Marked], Awaitable[None]]:
        return self._tell_item if session.vad is None else self._tell_turn

    async def _finish(self) -> None:
        """Listen to what has come, with the settings that it came under, before they change."""
        while self._sound is not None:
            self._sound.mark(Mark.END)
            await self._over()
        self._sent, self._items = 0, _Items()
        self._commits.clear()

    async def _listen(self, sound: Sound, session: Session) -> None:
        wanted = session.wanted(speech_model(self._desk, session.model))
        tell = self._tell(session)
        async with aclosing(self._live.hear(sound, wanted)) as events:
            async for event in events:
                await tell(event)

    async def _tell_turn(self, event: Event | Marked) -> None:
        """What is heard where pauses end an utterance."""
        items = self._items
        if isinstance(event, Marked):
            if event.mark is Mark.COMMIT and not self._commits.popleft():  # nobody has spoken
                await self._committed(items.close())
                await self._completed("", event.seconds)
        elif event.kind == "speech":
            start = round(event.start * 1000)
            await self._send("input_audio_buffer.speech_started", item_id=items.growing(), audio_start_ms=start)
        elif event.kind == "pause":
            end, name = round(event.end * 1000), items.close()
            await self._send("input_audio_buffer.speech_stopped", item_id=name, audio_end_ms=end)
            await self._committed(name)
        elif event.kind == "text":
            await self._delta(event.text)
        elif event.kind == "segment":
            if self._commits:
                self._commits[0] = True
            await self._completed(event.text, event.end - event.start)

    async def _tell_item(self, event: Event | Marked) -> None:
        """What is heard where the client says when an utterance ends: its segments are one text."""
        items = self._items
        if isinstance(event, Marked):
            if event.mark is Mark.COMMIT:
                self._commits.popleft()
                await self._completed(items.written.text, event.seconds)
            else:
                items.done()
        elif event.kind == "text":
            await self._delta(items.written.piece(event.text))
        elif event.kind == "segment":
            items.written.segment(event.text)

    async def _committed(self, name: str) -> None:
        before, self._items.last = self._items.last, name
        await self._send("input_audio_buffer.committed", item_id=name, previous_item_id=before)
        content = [{"type": "input_audio", "transcript": None}]
        item = {
            "id": name, "object": "realtime.item", "type": "message", "status": "completed", "role": "user",
            "content": content,
        }  # fmt: skip
        await self._send("conversation.item.added", item=item, previous_item_id=before)

    async def _delta(self, text: str) -> None:
        kind = "conversation.item.input_audio_transcription.delta"
        await self._send(kind, item_id=self._items.first, content_index=0, delta=text)

    async def _completed(self, text: str, seconds: float) -> None:
        kind = "conversation.item.input_audio_transcription.completed"
        name = self._items.done()
        await self._send(kind, item_id=name, content_index=0, transcript=text, usage=usage(seconds))

    async def _error(self, refusal: Refusal, index: str | None = None) -> None:
        await self._send("error", error=openai_error(refusal) | {"event_id": index})

    async def _close(self, refusal: Refusal) -> None:
        """The last event, and the end."""
        with suppress(WebSocketDisconnect, TimeoutError, RuntimeError):
            if self._items.last is not None and refusal.status >= 500:
                kind = "conversation.item.input_audio_transcription.failed"
                await self._send(kind, item_id=self._items.last, content_index=0, error=openai_error(refusal))
            await self._error(refusal)
            code = _WRONG if refusal.status < 429 else _LATER
            await self._socket.close(code, refusal.message.encode()[:120].decode(errors="ignore"))

    async def _send(self, kind: str, **fields: Any) -> None:
        """Raises TimeoutError for a client that takes nothing."""
        text = compact({"type": kind, "event_id": _name("event"), **fields})
        await asyncio.wait_for(self._socket.send_text(text), _SEND_S)

    async def _stop(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._listening


def _samples(event: Fields) -> np.ndarray:
    """The sound of an event: int16 [n]."""
    text = event.text("audio")
    if text is None:
        raise event.wrong("audio", None, "base64 of samples")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise event.wrong("audio", text, "base64 of samples") from None
    if len(data) % 2:
        raise Refusal(400, f"audio has {len(data)} bytes, expected whole samples of 2", code="invalid_value")
    return np.frombuffer(data, "<i2")


def _name(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(8)}"
