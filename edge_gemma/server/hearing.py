"""A Wyoming client's speech: one turn, which ends with a pause or when the client says so.

Owns: reading `transcribe` and `audio-start`, when a turn ends, the events of its text. Does not know: connections, how
speech is heard (live.py).

A turn that is spoken now ends with the first pause: Home Assistant takes the text before it has sent the rest. Sound
that comes faster than it is spoken is a recording, whose pauses end nothing.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from edge_gemma.audio.events import Event
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.samples import from_pcm
from edge_gemma.audio.segments import live_rules
from edge_gemma.server.bodies import Fields
from edge_gemma.server.desk import Desk
from edge_gemma.server.live import Live, Mark, Marked, Sound, Wanted, Written
from edge_gemma.server.openai_audio import speech_model
from edge_gemma.server.refusals import Refusal

NOBODY_S = 15.0  # of sound that is spoken now and has no words in it: the turn ends
LONGEST_S = 120.0  # of sound that is spoken now: the turn ends
_LAST_S = 1.0  # seconds of sound whose arrival says whether it is spoken now
_FASTEST = 2.0  # seconds of sound in a second, when it is: a network may hold some back for a while
_PAUSES = {"aggressive": 0.4, "default": 0.6, "relaxed": 1.2}  # vad_sensitivity -> seconds

Send = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Format:
    """width: bytes of a sample."""

    rate: int
    width: int
    channels: int


def read_start(data: Fields) -> Format:
    """The format in `audio-start` and `audio-chunk`. Raises Refusal."""
    values = {
        "rate": data.whole("rate", 8_000, 192_000), "width": data.whole("width", 1, 4),
        "channels": data.whole("channels", 1, 8),
    }  # fmt: skip
    for name, value in values.items():
        if value is None:
            raise data.wrong(name, None, "a number")
    return Format(**values)


def read_transcribe(desk: Desk, data: Fields) -> tuple[Wanted, str | None]:
    """How speech is to be heard, and its language as it was given. Raises Refusal, UnknownModelError, UsageError.

    Names and terms that should be favoured are hints that the model cannot take.
    """
    language = data.text("language")
    pause = _PAUSES.get(data.text("vad_sensitivity", "default"), _PAUSES["default"])
    task = Task(language.replace("_", "-") if language else None)
    return Wanted(task, live_rules(pause), speech_model(desk, data.text("name"))), language


class Hearing:
    """One turn. `run` tells what is heard, `put` and `stop` take the sound."""

    def __init__(self, form: Format, wanted: Wanted, language: str | None) -> None:
        """language: told with the text."""
        self._form, self._wanted, self._language = form, wanted, language
        self._sound = Sound(form.rate)
        self._rest = b""  # bytes of a sample that is not whole
        self._samples = 0
        self._arrivals = deque([(time.monotonic(), 0.0)])  # (when, seconds of sound so far)
        self._is_recording = False
        self._stopped = self._speaking = self._begun = False
        self._written = Written()

    async def put(self, data: Fields, payload: bytes) -> None:
        """More sound. After the turn has ended it is nothing. Raises Refusal for another format."""
        if self._stopped:
            return
        if (form := read_start(data)) != self._form:
            raise Refusal(400, f"the sound is {form} now, expected {self._form} as it began", code="invalid_value")
        payload = self._rest + payload
        whole = len(payload) - len(payload) % (form.width * form.channels)
        self._rest = payload[whole:]
        if whole:
            samples = from_pcm(payload[:whole], form.width, form.channels)
            self._arrived(len(samples))
            await self._sound.put(samples)
        nothing = not self._written.text and not self._speaking and self._seconds > NOBODY_S
        if (nothing or self._seconds > LONGEST_S) and self._is_live():
            self.stop()

    def stop(self) -> None:
        """The turn is over."""
        if not self._stopped:
            self._stopped = True
            self._sound.mark(Mark.COMMIT)

    @property
    def _seconds(self) -> float:
        return self._samples / self._form.rate

    def _arrived(self, samples: int) -> None:
        self._samples += samples
        self._arrivals.append((time.monotonic(), self._seconds))
        while len(self._arrivals) > 2 and self._arrivals[1][1] < self._seconds - _LAST_S:
            self._arrivals.popleft()

    def _is_live(self) -> bool:
        """Whether the sound comes as it is spoken. What was once taken for a recording stays one."""
        (began, before), (ended, seconds) = self._arrivals[0], self._arrivals[-1]
        self._is_recording = self._is_recording or seconds - before > _FASTEST * (ended - began)
        return not self._is_recording

    async def run(self, live: Live, send: Send) -> None:
        """Tell what is heard until the turn is over. Raises as Live.hear."""
        over = False
        async with aclosing(live.hear(self._sound, self._wanted)) as events:
            async for event in events:
                if not over and await self._tell(event, send):
                    over = self._stopped = True
                    await self._finish(send)
                    self._sound.mark(Mark.CLEAR)
                    self._sound.mark(Mark.END)
        if not over:
            await self._finish(send)

    async def _tell(self, event: Event | Marked, send: Send) -> bool:
        """Returns whether the turn is over with it."""
        if isinstance(event, Marked):
            return True
        if event.kind == "speech":
            self._speaking = True
            await send("voice-started", timestamp=round(event.start * 1000))
        elif event.kind == "pause":
            self._speaking = False
            await send("voice-stopped", timestamp=round(event.end * 1000))
        elif event.kind == "text":
            await self._begin(send)
            await send("transcript-chunk", text=self._written.piece(event.text))
        elif event.kind == "segment":
            self._written.segment(event.text)
            return bool(self._written.text) and not event.goes_on and not self._stopped and self._is_live()
        return False

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            await send("transcript-start", **self._spoken)

    async def _finish(self, send: Send) -> None:
        await self._begin(send)
        await send("transcript", text=self._written.text, **self._spoken)
        await send("transcript-stop")

    @property
    def _spoken(self) -> dict[str, Any]:
        return {} if self._language is None else {"language": self._language}
