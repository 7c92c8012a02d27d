"""Cuts a stream of sound into segments of speech as it arrives.

Owns: where segments begin and end (`Segmenter`). Does not know: how speech is told from noise (vad.py), what is done
with a segment.

Each sample is owned by exactly one segment, of speech or of silence. A segment of speech may hear more than it owns, as
context: if a speaker makes no pause for 30 s, the segment is cut, and the next one hears its last two seconds again.
So the word at the cut is heard whole at least once (transcribe.py joins the texts).

A pause ends a segment. The longer the segment, the shorter the pause that is enough: `pause_s` up to a length of
`relaxed_s`, then less and less, and `shortest_pause_s` in the last five seconds. So a cut without a pause is rare. No
decision is changed later, so sound can be processed as soon as it is heard.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edge_gemma.audio.features import MAX_SAMPLES, SAMPLE_RATE
from edge_gemma.audio.vad import WINDOW, Detector
from edge_gemma.errors import UsageError

_STARTS = 0.5  # probability at which speech starts: Silero's own default
_FALLS = 0.15  # speech goes on until the probability is so far below
_START_WINDOWS = 2  # windows of speech in a row that begin a segment: a click has one
_BEFORE = 10 * WINDOW  # samples owned before the first window of speech: 0.32 s
_AFTER = 8 * WINDOW  # samples owned after the last window of speech: 0.26 s
OVERLAP = 64 * WINDOW  # samples heard twice at a cut without a pause: 2.05 s
_LAST = 5.0  # the last seconds before the longest length: the shortest pause ends a segment


@dataclass(frozen=True)
class Rules:
    """When a segment begins and ends, in seconds. starts_at: the detector's probability at which speech starts."""

    pause_s: float  # of silence
    relaxed_s: float = 12.0  # length from which on shorter pauses are enough
    shortest_pause_s: float = 0.16
    longest_s: float = MAX_SAMPLES / SAMPLE_RATE
    starts_at: float = _STARTS

    def __post_init__(self) -> None:
        longest = MAX_SAMPLES / SAMPLE_RATE
        if not 3 * OVERLAP / SAMPLE_RATE <= self.longest_s <= longest:
            raise UsageError(f"segments are at most {self.longest_s} s long, expected 6.2 to {longest:g}")
        if not 0 < self.shortest_pause_s <= self.pause_s:
            raise UsageError(f"a pause of {self.pause_s} s ends a segment, expected {self.shortest_pause_s} or more")
        if not 0 < self.starts_at < 1:
            raise UsageError(f"speech starts at a probability of {self.starts_at}, expected between 0 and 1")

    @property
    def goes_on_at(self) -> float:
        """The probability down to which speech goes on."""
        return max(self.starts_at - _FALLS, self.starts_at / 2)

    def pause_needed(self, length_s: float) -> float:
        """Seconds of silence that end a segment of this length."""
        end = self.longest_s - _LAST
        share = (end - length_s) / max(end - self.relaxed_s, 1e-9)
        return max(self.shortest_pause_s, self.pause_s * min(1.0, share))


FILE_RULES = Rules(pause_s=1.5)  # a recording: long segments, more context for the model


def live_rules(pause_s: float = 0.6, starts_at: float = _STARTS) -> Rules:
    """Rules for a conversation, where an answer has to come soon. Raises UsageError for a pause_s that is not > 0."""
    return Rules(pause_s, shortest_pause_s=min(pause_s, Rules.shortest_pause_s), starts_at=starts_at)


LIVE_RULES = live_rules()


@dataclass(frozen=True)
class Span:
    """A segment: it owns samples [start, end) and hears [heard_from, heard_to), counted from the stream's first.

    speech: False for silence. joined: it begins at a cut, without a pause after the segment before. cut: it ends at
    one.
    """

    start: int
    end: int
    heard_from: int
    heard_to: int
    speech: bool
    joined: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Opened:
    """Speech began: what is heard next belongs to a new segment."""

    start: int
    heard_from: int


@dataclass(frozen=True)
class Heard:
    """The next samples of the open segment: float32 [n]."""

    samples: np.ndarray


@dataclass(frozen=True)
class Closed:
    """The open segment has ended; or a silent one has, which is never opened."""

    segment: Span


Step = Opened | Heard | Closed


class Segmenter:
    """Takes sound and returns steps: segments that open, what they hear, segments that close. Holds two seconds."""

    def __init__(self, detector: Detector, rules: Rules) -> None:
        self._detector, self._rules = detector, rules
        self._rest = np.zeros(0, np.float32)  # samples of an incomplete window
        self._recent: deque[np.ndarray] = deque(maxlen=OVERLAP // WINDOW)
        self._position = 0  # samples in whole windows so far
        self._owned = 0  # samples before this belong to closed segments
        self._opened: Opened | None = None
        self._joined = False
        self._voiced = 0  # windows of speech in a row, while closed
        self._speech_end = 0

    def feed(self, samples: np.ndarray) -> list[Step]:
        """Append samples: float32 [n] of 16 kHz, any n. Returns the steps that they cause."""
        samples = np.concatenate([self._rest, samples]) if len(self._rest) else samples
        whole = len(samples) // WINDOW * WINDOW
        self._rest = samples[whole:].copy()
        return _merged([step for at in range(0, whole, WINDOW) for step in self._window(samples[at : at + WINDOW])])

    def finish(self) -> list[Step]:
        """End the stream. An incomplete window belongs to the open segment, or to silence."""
        rest, self._rest = self._rest, self._rest[:0]
        self._position += len(rest)
        steps: list[Step] = []
        if self._opened is not None:
            heard: list[Step] = [Heard(rest)] if len(rest) else []
            steps = [*heard, self._close(min(self._position, self._speech_end + _AFTER))]
        return [*steps, *self._silence(self._position)]

    def steps(self, blocks: Iterable[np.ndarray]) -> Iterator[Step]:
        """All steps of a whole stream of blocks, each float32 [n] of 16 kHz."""
        for block in blocks:
            yield from self.feed(block)
        yield from self.finish()

    def _window(self, window: np.ndarray) -> list[Step]:
        probability = self._detector.probability(window)
        self._recent.append(window.copy())
        self._position += WINDOW
        return self._closed_window(probability) if self._opened is None else self._open_window(window, probability)

    def _closed_window(self, probability: float) -> list[Step]:
        self._voiced = self._voiced + 1 if probability >= self._rules.starts_at else 0
        if self._voiced < _START_WINDOWS:
            return []
        start = max(self._owned, self._position - self._voiced * WINDOW - _BEFORE)
        self._speech_end = self._position
        return [*self._silence(start), *self._open(start, start)]

    def _open_window(self, window: np.ndarray, probability: float) -> list[Step]:
        assert self._opened is not None
        steps: list[Step] = [Heard(window)]
        if probability >= self._rules.goes_on_at:
            self._speech_end = self._position
        heard_from = self._opened.heard_from
        pause = (self._position - self._speech_end) / SAMPLE_RATE
        if pause and pause >= self._rules.pause_needed((self._position - heard_from) / SAMPLE_RATE):
            return [*steps, self._close(min(self._position, self._speech_end + _AFTER))]
        if self._position + WINDOW - heard_from > self._rules.longest_s * SAMPLE_RATE:
            steps.append(self._close(self._position - OVERLAP // 2, cut=True))
            self._joined = True
            steps += self._open(self._owned, self._position - OVERLAP)
        return steps

    def _open(self, start: int, heard_from: int) -> list[Step]:
        self._opened = Opened(start, heard_from)
        windows = (self._position - heard_from) // WINDOW
        return [self._opened, Heard(np.concatenate(list(self._recent)[-windows:]))]

    def _close(self, end: int, cut: bool = False) -> Closed:
        assert self._opened is not None
        opened, joined = self._opened, self._joined
        self._opened, self._joined, self._voiced, self._owned = None, False, 0, end
        return Closed(Span(opened.start, end, opened.heard_from, self._position, True, joined, cut))

    def _silence(self, end: int) -> list[Step]:
        start, self._owned = self._owned, end
        return [Closed(Span(start, end, start, end, False))] if end > start else []


def _merged(steps: list[Step]) -> list[Step]:
    """The steps, with consecutive `Heard`s joined to one."""
    merged: list[Step] = []
    parts: list[np.ndarray] = []
    for step in [*steps, None]:
        if isinstance(step, Heard):
            parts.append(step.samples)
            continue
        if parts:
            merged.append(Heard(np.concatenate(parts)))
            parts = []
        if step is not None:
            merged.append(step)
    return merged
