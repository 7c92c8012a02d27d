"""Who has the floor: the person who speaks, or the model that answers.

Owns: noticing that somebody speaks while the model answers. Does not know: how an answer is stopped.
"""

import threading
from collections.abc import Callable
from typing import Protocol

from edge_gemma.audio import segments as cut


class Speaking(Protocol):
    """The part of `edge_gemma.voice.speaker.Speaker` that is used here."""

    def begin(self) -> None: ...
    def say(self, text: str) -> None: ...
    def finish(self) -> None: ...
    def stop(self) -> None: ...
    @property
    def first_sound_at(self) -> float | None: ...
    @property
    def heard(self) -> str: ...
    @property
    def sounding(self) -> bool: ...


class Floor:
    """Steps of a segmenter are `noticed` as they come, in one thread, and `taken` when their turn comes, in another."""

    def __init__(self, stop: Callable[[], None], speaker: Speaking | None = None) -> None:
        """stop: ends the answer, in any thread. speaker: says it aloud."""
        self._stop, self._speaker = stop, speaker
        self._lock = threading.Lock()
        self._opened = 0  # times that somebody began to speak, noticed and not taken
        self._speaking = self._answering = False
        self.interrupted = False  # the last answer

    def begin(self) -> None:
        """Another stream is heard: nobody speaks, nobody is answered."""
        with self._lock:
            self._opened = 0
            self._speaking = self._answering = False

    @property
    def busy(self) -> bool:
        """Whether somebody speaks or is answered."""
        return self._speaking or self._answering or (self._speaker is not None and self._speaker.sounding)

    def noticed(self, step: cut.Step) -> None:
        """A step that has come. Somebody who begins to speak interrupts the answer."""
        if isinstance(step, cut.Opened):
            self._speaking = True
            with self._lock:
                self._opened += 1
            self.interrupt()
        elif isinstance(step, cut.Closed) and step.segment.speech:
            self._speaking = False

    def interrupt(self) -> None:
        """End the answer, if one is written or said."""
        with self._lock:
            speaker = self._speaker if self._speaker is not None and self._speaker.sounding else None
            if not self._answering and speaker is None:
                return
            self.interrupted = True
        if self._speaker is not None:
            self._speaker.stop()
        self._stop()

    def taken(self, step: cut.Step) -> None:
        """The turn of a step that was noticed has come."""
        if isinstance(step, cut.Opened):
            with self._lock:
                self._opened -= 1

    def answer(self) -> bool:
        """Give the model the floor. Returns False if somebody speaks again already."""
        with self._lock:
            if self._opened:
                return False
            self._answering, self.interrupted = True, False
            return True

    def answered(self) -> None:
        """The answer is written."""
        self._answering = False
