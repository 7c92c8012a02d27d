"""Wyoming, the protocol of Home Assistant's voice services, on a port of its own: speech to text, and conversations.

Owns: connections, what the server says it can do, the order of events. Does not know: how speech is heard (live.py),
how questions are answered (agent.py), bytes on the wire (wyoming_events.py).

The protocol has no key: whoever reaches the port may use it.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from edge_gemma import __version__
from edge_gemma.audio.prompts import LANGUAGES
from edge_gemma.errors import EdgeGemmaError
from edge_gemma.generation.generate import Result
from edge_gemma.server import stalled
from edge_gemma.server import wyoming_events as events
from edge_gemma.server.about import about
from edge_gemma.server.agent import Agent
from edge_gemma.server.bodies import Fields
from edge_gemma.server.desk import Desk, current_request
from edge_gemma.server.hearing import Hearing, read_start, read_transcribe
from edge_gemma.server.live import Live
from edge_gemma.server.models import Offer
from edge_gemma.server.refusals import Refusal, refusal_of

log = logging.getLogger("edge_gemma.server")

CONNECTIONS = 64
_SETTLE_S = 0.5
_MADE_BY = {"name": "edge_gemma", "url": "https://ai.google.dev/gemma"}
_NOT_HERE = ("synthesize", "synthesize-start", "detect", "recognize", "run-pipeline", "run-satellite")


class Wyoming:
    """The server of this protocol. A context: it serves as long as that lasts."""

    def __init__(self, desk: Desk, live: Live, agent: Agent, listening: socket.socket) -> None:
        """listening: a socket that listens; it is closed in the end."""
        self.desk, self.live, self.agent = desk, live, agent
        self._listening = listening
        self._connections: set[asyncio.Task[None]] = set()
        desk.watch.gauge("wyoming_connections", "Connections of Wyoming's clients", lambda: len(self._connections))

    async def __aenter__(self) -> "Wyoming":
        self._server = await asyncio.start_server(self._connected, sock=self._listening, limit=events.LINE_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stalled.limit(writer.transport)
        connection = _Connection(self, reader, writer)
        if len(self._connections) >= CONNECTIONS:
            task = asyncio.ensure_future(connection.refuse("too many connections: try again later", "too_many"))
        else:
            task = asyncio.ensure_future(connection.run())
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def info(self) -> dict[str, Any]:
        """What it can do: as the models are, that are there now."""
        offers = self.desk.models.offers()
        able = {offer.name: _abilities(offer) for offer in offers}
        hear = [_about(name, languages=list(LANGUAGES)) for name, (hears, _) in able.items() if hears]
        talk = [_about(name, languages=list(LANGUAGES)) for name, (_, talks) in able.items() if talks][:1]
        asr = _about(
            "edge-gemma", models=hear, supports_transcript_streaming=True, requires_external_vad=False,
            prefers_auto_gain_enabled=False, prefers_noise_reduction_enabled=False,
        )  # fmt: skip
        handle = _about("edge-gemma", models=talk, supports_handled_streaming=True, supports_home_control=False)
        empty = {name: list[Any]() for name in ("tts", "intent", "wake", "mic", "snd")}
        return {"asr": [asr] if hear else [], "handle": [handle] if talk else []} | empty


def _abilities(offer: Offer) -> tuple[bool, bool]:
    """Whether a model hears, and whether it can be talked to."""
    try:
        model = about(offer)
        return model.hears, model.template is not None
    except (EdgeGemmaError, OSError):
        return False, False


def _about(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "attribution": _MADE_BY, "installed": True, "description": f"Gemma on this machine ({name})",
        "version": __version__, **more,
    }  # fmt: skip


class _Connection:
    """One client: one job at a time, while events go on coming in."""

    def __init__(self, server: Wyoming, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server, self._reader, self._writer = server, reader, writer
        peer = writer.get_extra_info("peername")
        self._client = str(peer[0]) if isinstance(peer, tuple) else "-"
        self._job: asyncio.Task[None] | None = None
        self._hearing: Hearing | None = None
        self._asked = Fields({})  # of the last `transcribe`

    async def run(self) -> None:
        """Serve it until one side ends it."""
        try:
            while (event := await events.read(self._reader)) is not None:
                await self._take(*event)
        except events.LostError as error:
            await self.refuse(str(error), "invalid_event")
        except ConnectionError:
            pass
        except Exception:
            log.exception("a connection of Wyoming failed")
            await self.refuse("something went wrong in the server: its log says more", "internal")
        finally:
            await self._close()

    async def refuse(self, text: str, code: str) -> None:
        """Say why, and end it."""
        with contextlib.suppress(ConnectionError):
            await self._send("error", text=text, code=code)
        self._writer.close()

    async def _close(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await job
        self._writer.close()

    async def _send(self, kind: str, **data: Any) -> None:
        await events.write(self._writer, kind, data)

    async def _take(self, kind: str, data: Fields, payload: bytes) -> None:
        """An event of the client. What is wrong with it is told, and the connection goes on."""
        try:
            if kind == "describe":
                await self._send("info", **self._server.info())
            elif kind == "ping":
                await self._send("pong", **({"text": text} if (text := data.text("text")) is not None else {}))
            elif kind == "transcribe":
                await self._idle()
                self._asked = data
            elif kind == "audio-start":
                await self._listen(data)
            elif kind == "audio-chunk":
                await self._hear(data, payload)
            elif kind == "audio-stop":
                self._stop()
            elif kind == "transcript":
                await self._handle(data)
            elif kind in _NOT_HERE:
                raise Refusal(
                    400, f"{kind} is not served here: take speech to text, or a conversation", code="unsupported"
                )
        except (Refusal, EdgeGemmaError) as error:
            refusal = refusal_of(error)
            await self._send("error", text=refusal.message, code=refusal.code or refusal.kind)

    async def _idle(self) -> None:
        """Raises Refusal while something is done for this client. What has told its answer may settle first."""
        if self._job is not None and not self._job.done():
            await asyncio.wait({self._job}, timeout=_SETTLE_S)
        if self._job is not None and not self._job.done():
            raise Refusal(400, "one request at a time: wait for the answer, or open another connection", code="busy")

    def _begin(self, what: str, job: Callable[[], Awaitable[None]]) -> None:
        self._job = asyncio.create_task(self._told(what, job))

    async def _told(self, what: str, job: Callable[[], Awaitable[None]]) -> None:
        """Do a job. Its errors are told to the client, and a line to the log."""
        index, since, how = f"wyo_{secrets.token_hex(8)}", time.perf_counter(), "left"
        current_request.set(index)
        try:
            try:
                await job()
                how = "ok"
            except Exception as error:
                if isinstance(error, ConnectionError):
                    raise
                refusal = refusal_of(error)
                how = refusal.code or refusal.kind
                if refusal.status == 500:
                    log.exception("%s failed", index)
                await self._send("error", text=refusal.message, code=how)
        except ConnectionError:
            self._writer.close()
        finally:
            log.info("%s wyoming %s %s %.3fs from %s", index, what, how, time.perf_counter() - since, self._client)

    async def _listen(self, data: Fields) -> None:
        await self._idle()
        wanted, language = read_transcribe(self._server.desk, self._asked)
        self._asked = Fields({})
        self._hearing = hearing = Hearing(read_start(data), wanted, language)
        self._begin("transcribe", lambda: hearing.run(self._server.live, self._send))

    async def _hear(self, data: Fields, payload: bytes) -> None:
        if self._hearing is None:
            raise Refusal(400, "audio-chunk came before audio-start", code="wrong_order")
        await self._hearing.put(data, payload)

    def _stop(self) -> None:
        if self._hearing is None:
            raise Refusal(400, "audio-stop came before audio-start", code="wrong_order")
        self._hearing.stop()
        self._hearing = None

    async def _handle(self, data: Fields) -> None:
        await self._idle()
        text, context = data.text("text"), data.object("context") or Fields({})
        if text is None:
            raise data.wrong("text", None, "a text")
        name = context.text("conversation_id")
        self._begin("handle", lambda: self._answer(text, name))

    async def _answer(self, text: str, name: str | None) -> None:
        context = {} if name is None else {"context": {"conversation_id": name}}
        begun, result = False, None
        async with contextlib.aclosing(self._server.agent.answer(text, name, self._client)) as parts:
            async for part in parts:
                if isinstance(part, Result):
                    result = part
                    continue
                if not begun:
                    await self._send("handled-start", **context)
                    begun = True
                await self._send("handled-chunk", text=part)
        if result is None or not result.text.strip():
            await self._send("not-handled", text="The model has no answer.", **context)
        else:
            await self._send("handled", text=result.text, **context)
        if begun:
            await self._send("handled-stop")
