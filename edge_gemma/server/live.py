"""Speech that arrives now, for every protocol: the event loop takes it in, a thread hears it in its turns.

Owns: the sound that waits, the order of sound and of what a client says about it, listeners that stay ready. Does not
know: protocols.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from weakref import WeakKeyDictionary

import numpy as np

from edge_gemma.audio.events import Event
from edge_gemma.audio.listen import Listener
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.seams import glue
from edge_gemma.audio.segments import LIVE_RULES, Rules
from edge_gemma.engine import Engine
from edge_gemma.server.desk import Desk
from edge_gemma.server.turns import LIVE, Stopped, Turns

log = logging.getLogger("edge_gemma.server")

IDLE_S = 30.0  # without sound, after which a stream is no longer listened to
WAITING_BYTES = 16 << 20  # of sound that wait at most, minutes of it: who sends more has to wait himself
_ITEM_BYTES = 256  # that an item takes beside its samples
_BLOCK_S = 0.5  # seconds of sound that are taken at a time
_READY = 4  # listeners that are kept for the next stream
_LOOK_S = 0.25


class Mark(Enum):
    """What a client says about the sound before it."""

    COMMIT = "commit"  # it is an utterance
    CLEAR = "clear"  # since the last mark, it is to be forgotten
    END = "end"  # nothing comes any more


@dataclass(frozen=True)
class Marked:
    """The turn of a mark has come: all events of the sound before it were told. seconds: of sound since the last."""

    mark: Mark
    seconds: float


@dataclass(frozen=True)
class Wanted:
    """How speech is heard. model: None for the default."""

    task: Task = Task()  # noqa: RUF009  (frozen)
    rules: Rules = LIVE_RULES
    model: str | None = None


class Sound:
    """Sound between a connection and the thread that hears it. `take` belongs to the thread, the rest to the loop."""

    def __init__(self, rate: int) -> None:
        """rate: samples a second."""
        self.rate = rate
        self._items: deque[np.ndarray | Mark] = deque()
        self._waiting = 0  # bytes
        self._changed = threading.Condition()
        self._room, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._closed = False

    async def put(self, samples: np.ndarray) -> None:
        """Append samples, as `samples.as_samples` takes them, always of one kind. Waits while there is no room."""
        while self._waiting > WAITING_BYTES and not self._closed:
            self._room.clear()
            await self._room.wait()
        if self._closed:
            return
        with self._changed:
            self._append(samples)
            self._changed.notify()

    def mark(self, mark: Mark) -> None:
        """Say something about the sound so far. CLEAR also forgets what waits."""
        with self._changed:
            while mark is Mark.CLEAR and self._items and isinstance(last := self._items[-1], np.ndarray):
                self._waiting -= _size(last)
                self._items.pop()
            self._append(mark)
            self._changed.notify()

    def _append(self, item: np.ndarray | Mark) -> None:
        self._items.append(item)
        self._waiting += _size(item)

    def close(self) -> None:
        """Nobody listens any more: what comes is forgotten."""
        self._closed = True
        self._room.set()

    @property
    def left(self) -> list[np.ndarray | Mark]:
        """What waits: once nobody listens any more, what came too late for it."""
        with self._changed:
            return list(self._items)

    def take(self, stopping: threading.Event) -> np.ndarray | Mark:
        """The next samples, or the next mark. END if nothing comes for a while. Raises Stopped."""
        end = time.monotonic() + IDLE_S
        with self._changed:
            while not self._items:
                self._changed.wait(_LOOK_S)
                if stopping.is_set():
                    raise Stopped
                if time.monotonic() > end:
                    return Mark.END
            item = self._items.popleft()
            self._waiting -= _size(item)
            if isinstance(item, Mark):
                return item
            parts, samples = [item], len(item)
            while self._items and samples < _BLOCK_S * self.rate and isinstance(more := self._items[0], np.ndarray):
                self._items.popleft()
                self._waiting -= _size(more)
                parts.append(more)
                samples += len(more)
        self._loop.call_soon_threadsafe(self._room.set)
        return np.concatenate(parts)


def _size(item: np.ndarray | Mark) -> int:
    """Bytes that an item takes."""
    return _ITEM_BYTES + (item.nbytes if isinstance(item, np.ndarray) else 0)


class Written:
    """The text of several segments, as it comes."""

    def __init__(self) -> None:
        self.text = ""
        self._inside = False  # a segment

    def piece(self, text: str) -> str:
        """A piece of the present segment, as it continues the text."""
        begins, self._inside = not self._inside and self.text, True
        return glue(self.text, text)[len(self.text) :] if begins else text

    def segment(self, text: str) -> None:
        """The present segment is complete."""
        self.text, self._inside = glue(self.text, text), False


class Live:
    """Hears streams. Its coroutines belong to the desk's event loop."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._ready = desk, _Ready()

    async def hear(self, sound: Sound, wanted: Wanted) -> AsyncGenerator[Event | Marked, None]:
        """What is heard, while it is spoken, until END. Times count from the beginning of the sound.

        Raises TooManyLiveError, NotReadyError, and EdgeGemmaError for a model that hears nothing. When it is closed,
        the work ends within a layer.
        """

        def work(engine: Engine, stopping: threading.Event) -> Iterator[Event | Marked]:
            turns = self._desk.turns
            with turns.turn(LIVE, stopping), self._ready.listener(engine, wanted) as listener:
                yield from _heard(listener, sound, turns, stopping)

        try:
            async with aclosing(self._desk.run_live(work, wanted.model)) as events:
                async for event in events:
                    yield event
        finally:
            sound.close()


class _Ready:
    """Listeners between two streams: their instruction is prefilled. Used by the thread that has its turn."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[object, list[tuple[Wanted, Listener]]] = WeakKeyDictionary()  # by encoder

    @contextmanager
    def listener(self, engine: Engine, wanted: Wanted) -> Iterator[Listener]:
        """One for a stream. If that ends well, it is kept."""
        kept = self._kept.setdefault(engine.audio, [])
        found = next((entry for entry in kept if entry[0] == wanted), None)
        if found is not None:
            kept.remove(found)
        listener = found[1] if found else Listener(engine, wanted.task, rules=wanted.rules, note=log.debug, pauses=True)
        yield listener
        kept.append((wanted, listener))
        del kept[:-_READY]


class _Cleared(Exception):
    """The sound is to be forgotten."""


class _Utterance:
    """The sound up to the next mark, in blocks. The turn goes to others while it waits for sound."""

    def __init__(self, sound: Sound, turns: Turns, stopping: threading.Event) -> None:
        self._sound, self._turns, self._stopping = sound, turns, stopping
        self.samples, self.mark = 0, Mark.END

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            with self._turns.rest():
                item = self._sound.take(self._stopping)
            if isinstance(item, Mark):
                self.mark = item
                if item is Mark.CLEAR:
                    raise _Cleared
                return
            self.samples += len(item)
            yield item


def _heard(listener: Listener, sound: Sound, turns: Turns, stopping: threading.Event) -> Iterator[Event | Marked]:
    begun = 0.0  # seconds before this utterance
    while True:
        utterance = _Utterance(sound, turns, stopping)
        try:
            for event in listener.events(utterance, sound.rate):
                yield replace(event, start=event.start + begun, end=event.end + begun)
        except _Cleared:
            pass
        seconds = utterance.samples / sound.rate
        begun += seconds
        if utterance.mark is Mark.END:
            return
        yield Marked(utterance.mark, seconds)
