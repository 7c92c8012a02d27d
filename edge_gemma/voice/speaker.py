"""Says an answer aloud while it is written.

Owns: the order of work (clause after clause, one ahead of the loudspeaker), what of an answer was heard when it is cut
off. Does not know: how a voice makes sound (voices.py), how it is played (loudspeaker.py), who listens.
"""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_gemma.errors import AudioError, EdgeGemmaError
from edge_gemma.voice.clauses import Clause, Clauses
from edge_gemma.voice.loudspeaker import Loudspeaker
from edge_gemma.voice.speakable import check_language, speakable
from edge_gemma.voice.voices import Voice, named

_ECHO_S = 0.3  # after the last sound, until a microphone in the same room hears nothing of it
_LOOK_S = 0.02
_CLOSING_S = 5.0
_LONGEST_S = 180.0  # of sound for one clause: a voice that goes on longer does not end


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
    """A clause whose sound has begun, or that has none. start, end: seconds of sound before it, and with it."""

    clause: Clause
    start: float
    end: float


class _Answer:
    """What is known of one answer. stops: how often the speaker had been stopped when it began."""

    def __init__(self, language: str | None, stops: int) -> None:
        self.clauses, self.stops = Clauses(language), stops
        self.said: list[_Said] = []
        self.cut: str | None = None  # what was heard of it when it was cut off
        self.failed = False  # that the voice fails was told
        self.first_sound_at: float | None = None

    def heard(self, played: float) -> str:
        """Its beginning that was heard, to the last whole word. played: seconds of sound."""
        text = ""
        for said in self.said:
            if played < said.end:
                share = max(0.0, played - said.start) / max(1e-9, said.end - said.start)
                part = said.clause.text[: int(share * len(said.clause.text))]
                return text + part[: part.rfind(" ") + 1]
            text += said.clause.text
        return text


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
            try:
                self._loudspeaker = Loudspeaker(loudspeaker)
            except BaseException:
                self._voice.close()
                raise
        else:
            self._loudspeaker = loudspeaker
        self._note, self._language = note, language
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[_Answer, Clause] | None] = queue.SimpleQueue()
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
            self._answer = _Answer(self._language, self._stops)

    def say(self, text: str) -> None:
        """Append a piece of the answer. One that was cut off is not said on."""
        self._put(self._answer, self._answer.clauses.push(text))

    def finish(self) -> None:
        """The answer is whole: its last clause may be said."""
        self._put(self._answer, self._answer.clauses.finish())

    def announce(self, text: str) -> None:
        """Say something that is no part of an answer, after what is being said; in any thread."""
        self._put(_Answer(None, self._stops), [Clause("", speakable(text, self._language))])

    def stop(self) -> None:
        """Be silent at once; what was not said yet never is."""
        with self._lock:
            if self._answer.cut is None:
                self._answer.cut = self._heard()
            self._stops += 1
            self._appended, self._over_at = 0.0, min(self._ends(), time.monotonic())
        self._loudspeaker.stop()
        self._voice.stop()

    @property
    def heard(self) -> str:
        """The beginning of the present answer that was heard, to the last whole word."""
        with self._lock:
            return self._heard() if self._answer.cut is None else self._answer.cut

    @property
    def first_sound_at(self) -> float | None:
        """When the present answer began to sound, by time.perf_counter; None before that."""
        return self._answer.first_sound_at

    @property
    def sounding(self) -> bool:
        """Whether a microphone in the same room may hear the voice."""
        with self._lock:
            return time.monotonic() < self._ends() + self._loudspeaker.latency + _ECHO_S

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
        return self._answer.heard(self._loudspeaker.played - self._loudspeaker.latency)

    def _ends(self) -> float:
        """When the last sound ends, by time.monotonic."""
        if left := self._loudspeaker.left:
            self._over_at = time.monotonic() + left
        return self._over_at

    def _put(self, answer: _Answer, clauses: list[Clause]) -> None:
        with self._lock:
            if answer.stops == self._stops:
                self._unsaid += len(clauses)
                for clause in clauses:
                    self._waiting.put((answer, clause))

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            try:
                self._speak(*waiting)
            except Exception as error:  # a voice is the user's: whatever it does, the next clauses are said
                self._tell(waiting[0], error)
            finally:
                with self._lock:
                    self._unsaid -= 1

    def _tell(self, answer: _Answer, error: Exception) -> None:
        if not answer.failed:
            answer.failed = True
            with contextlib.suppress(Exception):  # the screen may be gone
                self._note(f"not said aloud: {error if isinstance(error, EdgeGemmaError) else repr(error)}")

    def _speak(self, answer: _Answer, clause: Clause) -> None:
        with self._lock:
            if answer.stops != self._stops:
                return
            said = _Said(clause, self._appended, self._appended)
        if clause.spoken:
            self._play(answer, said)
        with self._lock:
            if said.start == said.end and answer.stops == self._stops:
                answer.said.append(said)

    def _play(self, answer: _Answer, said: _Said) -> None:
        for samples, rate in self._voice.speak(said.clause.spoken):
            seconds = self._loudspeaker.play(samples, rate) if answer.stops == self._stops else 0.0
            with self._lock:
                stopped = answer.stops != self._stops
                if not stopped and seconds:
                    if said.start == said.end:
                        answer.said.append(said)
                    self._appended += seconds
                    said.end = self._appended
                    answer.first_sound_at = answer.first_sound_at or time.perf_counter()
            if stopped:
                self._loudspeaker.stop()  # `stop` may have come just before `play`
                return
            if said.end - said.start > _LONGEST_S:
                self._voice.stop()
                raise AudioError(f"the voice does not end: {_LONGEST_S:g} s of sound for one clause")
