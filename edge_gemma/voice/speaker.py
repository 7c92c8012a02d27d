"""Says an answer aloud while it is written.

Owns: the order of work (clause after clause, one ahead of the loudspeaker), what of an answer was heard when it is cut
off. Does not know: how a voice makes sound (voices.py), how it is played (loudspeaker.py), who listens.
"""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_gemma.errors import EdgeGemmaError
from edge_gemma.voice.clauses import Clause, Clauses
from edge_gemma.voice.loudspeaker import Loudspeaker
from edge_gemma.voice.speakable import check_language, speakable
from edge_gemma.voice.voices import Voice, named

_ECHO_S = 0.3  # after the last sound, until a microphone in the same room hears nothing of it
_LOOK_S = 0.02
_CLOSING_S = 5.0


class Player(Protocol):
    """The part of `edge_gemma.voice.loudspeaker.Loudspeaker` that is used here."""

    played: float

    def play(self, samples: np.ndarray, rate: int) -> float: ...
    def stop(self) -> None: ...
    @property
    def left(self) -> float: ...
    @property
    def latency(self) -> float: ...
    def close(self) -> None: ...


@dataclass
class _Said:
    """A clause that is played. start, end: seconds of sound before it, and with it."""

    clause: Clause
    start: float
    end: float


class Speaker:
    """One answer after another. For each: `say` any number of times, `finish`. `stop` cuts it off, from any thread."""

    def __init__(
        self,
        voice: Voice | str = "",
        loudspeaker: Player | int | str | None = None,
        *,
        language: str | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """voice: `tcp://HOST[:PORT]`, a Wyoming server; a command that reads a text and writes a WAV file, as
        `espeak-ng --stdin --stdout`; "" is espeak-ng. loudspeaker: its number, a part of its name, None for the
        system's default. language: numbers are spelled out in it (speakable.py); None leaves them to the voice.

        note: told, in a thread of its own, when the voice fails; what it fails at is not said. Raises UsageError for a
        language without such words and for a voice that is not there, AudioError for a server that does not answer
        and a loudspeaker that cannot be used.
        """
        if language is not None:
            check_language(language)
        self._voice = named(voice) if isinstance(voice, str) else voice
        self._loudspeaker: Player
        if isinstance(loudspeaker, int | str | None):
            self._loudspeaker = Loudspeaker(loudspeaker)
        else:
            self._loudspeaker = loudspeaker
        self._note, self._language = note, language
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[int, Clause] | None] = queue.SimpleQueue()
        self._unsaid = 0  # clauses that wait or are being spoken
        self._stops = 0  # how often `stop` was called; what was given before the last time is not said
        self._appended = 0.0  # seconds of sound that the loudspeaker was given since then
        self._over_at = -math.inf  # when the last sound ends, by time.monotonic
        self.begin()
        self._thread = threading.Thread(target=self._run, name="speaker", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """A new answer. What is left of another one is still said."""
        with self._lock:
            self._clauses = Clauses(self._language)
            self._begun = self._stops
            self._said: list[_Said] = []
            self._cut: str | None = None
            self._failed = False
            self.first_sound_at: float | None = None  # of this answer, by time.perf_counter

    def say(self, text: str) -> None:
        """Append a piece of the answer. One that was cut off is not said on."""
        self._put(self._begun, self._clauses.push(text))

    def finish(self) -> None:
        """The answer is whole: its last clause may be said."""
        self._put(self._begun, self._clauses.finish())

    def announce(self, text: str) -> None:
        """Say something that is no part of an answer, after what is being said; in any thread."""
        self._put(self._stops, [Clause("", speakable(text, self._language))])

    def stop(self) -> None:
        """Be silent at once; what was not said yet never is."""
        with self._lock:
            if self._cut is None:
                self._cut = self._heard()
            self._stops += 1
            self._appended, self._over_at = 0.0, time.monotonic()
        self._loudspeaker.stop()
        self._voice.stop()

    @property
    def heard(self) -> str:
        """The beginning of the present answer that was heard, to the last whole word."""
        with self._lock:
            return self._heard() if self._cut is None else self._cut

    @property
    def sounding(self) -> bool:
        """Whether a microphone in the same room may hear the voice."""
        with self._lock:
            if left := self._loudspeaker.left:
                self._over_at = time.monotonic() + left
            return time.monotonic() < self._over_at + self._loudspeaker.latency + _ECHO_S

    def wait(self, timeout: float = math.inf) -> bool:
        """Until all is said and heard. Returns False if `timeout` seconds were not enough."""
        end = time.monotonic() + timeout
        while self._unsaid or self._loudspeaker.left:
            if time.monotonic() > end:
                return False
            time.sleep(_LOOK_S)
        time.sleep(min(self._loudspeaker.latency, max(0.0, end - time.monotonic())))
        return True

    def close(self) -> None:
        """Be silent, and free the voice and the loudspeaker."""
        self.stop()
        self._waiting.put(None)
        self._thread.join(_CLOSING_S)
        self._voice.close()
        self._loudspeaker.close()

    def __enter__(self) -> "Speaker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _heard(self) -> str:
        played, text = self._loudspeaker.played - self._loudspeaker.latency, ""
        for said in self._said:
            if played < said.end:
                share = max(0.0, played - said.start) / (said.end - said.start)
                part = said.clause.text[: int(share * len(said.clause.text))]
                return text + part[: part.rfind(" ") + 1]
            text += said.clause.text
        return text

    def _put(self, stops: int, clauses: list[Clause]) -> None:
        with self._lock:
            if stops == self._stops:
                self._unsaid += len(clauses)
                for clause in clauses:
                    self._waiting.put((stops, clause))

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            try:
                self._speak(*waiting)
            except EdgeGemmaError as error:
                if not self._failed:
                    self._failed = True
                    self._note(f"not said aloud: {error}")
            finally:
                with self._lock:
                    self._unsaid -= 1

    def _speak(self, stops: int, clause: Clause) -> None:
        with self._lock:
            if stops != self._stops:
                return
            said = _Said(clause, self._appended, self._appended)
            self._said.append(said)
        for samples, rate in self._voice.speak(clause.spoken) if clause.spoken else ():
            seconds = self._loudspeaker.play(samples, rate) if stops == self._stops else 0.0
            with self._lock:
                stopped = stops != self._stops
                if not stopped:
                    self._appended += seconds
                    said.end = self._appended
                    self.first_sound_at = self.first_sound_at or time.perf_counter()
            if stopped:
                self._loudspeaker.stop()  # `stop` may have come just before `play`
                return
