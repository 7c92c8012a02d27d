"""Recorded speech to text: any length, in segments.

Owns: the way from segments of speech to a `Transcription` (retries, joining) and to subtitles. Does not know: how a
recording is cut (cuts.py), how a session is driven (recogniser.py).
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edge_gemma.audio.cuts import Cut, Cutter, Progress
from edge_gemma.audio.features import MAX_SAMPLES, SAMPLE_RATE
from edge_gemma.audio.levels import quietest_moment
from edge_gemma.audio.prompts import Task, audio_prompt
from edge_gemma.audio.recogniser import Scribe, SpeechEngine, verbatim
from edge_gemma.audio.samples import (
    SAMPLE_TYPES,
    Note,
    Samples,
    array_blocks,
    as_samples,
    checked_rate,
    live_blocks,
    silent,
)
from edge_gemma.audio.seams import glue, glued, seam
from edge_gemma.audio.segments import FILE_RULES, Rules
from edge_gemma.audio.vad import WINDOW, Detector
from edge_gemma.errors import UsageError
from edge_gemma.host.sources import Source

_SPLIT_FROM_S = 8.0  # seconds: a longer segment that fails is tried again in halves
_LEAST_CHARACTERS = 1.0  # for a second of speech; English has about 14, Chinese 4
_PADDING = np.zeros(SAMPLE_RATE // 2, np.float32)  # silence around a segment that gave no text, for the second try
_CUE_CHARACTERS = 84  # characters of a subtitle: two lines


@dataclass(frozen=True)
class Segment:
    """What was said from start to end, in seconds. note: "looped" (cut short), "empty" (speech, but no text came)."""

    start: float
    end: float
    text: str
    translation: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Transcription:
    """The text of one recording. language: the one asked for, None if it was left to the model."""

    text: str
    segments: tuple[Segment, ...]
    language: str | None
    duration_s: float
    rtf: float  # seconds of work for a second of sound
    translation: str | None = None
    translate_to: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON. Those that are None are left out, except `language`."""
        entry = asdict(self)
        entry["segments"] = [{k: v for k, v in s.items() if v is not None} for s in entry["segments"]]
        return {k: v for k, v in entry.items() if v is not None or k == "language"}

    def srt(self) -> str:
        """SubRip subtitles: of the translation if there is one, else of the text."""
        return subtitles(self.segments)

    def vtt(self) -> str:
        """As `srt`, in the form of WebVTT."""
        return webvtt(self.segments)


OnSegment = Callable[[Segment], None]


class Transcriber:
    """Transcribes one recording after another; the instruction is prefilled once."""

    def __init__(
        self,
        engine: SpeechEngine,
        task: Task | None = None,
        *,
        rules: Rules = FILE_RULES,
        detector: Callable[[], Detector] | None = None,
        num_beams: int | None = None,
        note: Note = silent,
    ) -> None:
        """task: None for a transcription in any language. detector: makes one for each recording, None for Silero.

        num_beams: the hypotheses that the beam search keeps, None for the checkpoint's own number. note is called with
        what the user should know. Raises UsageError for a model that was not made for speech.
        """
        self.task, self._note = task or Task(), note
        self._cutter = Cutter(rules, detector, note)
        self._encoder = engine.audio
        prompt = audio_prompt(engine.chat_template, engine.tokenizer, self.task.instruction)
        self.scribe = Scribe(engine, prompt, sampling=verbatim(engine.generation_config, num_beams))

    def transcribe(
        self,
        source: Source | Samples,
        *,
        rate: int | None = None,
        track: int | None = None,
        progress: Progress | None = None,
        on_segment: OnSegment = lambda segment: None,
    ) -> Transcription:
        """Transcribe a file, as `AudioFile` takes it, or samples, as `samples.array_blocks` does.

        rate: of samples, Hz, 16000 by default. track: of a file with several sound tracks, from 1; None tries the next
        one if the first has no speech. progress is called after each block, on_segment with each segment when its text
        is final. Raises AudioError for sound that cannot be read, UsageError for arguments that cannot be served.
        """
        return _drained(self.stream(source, rate=rate, track=track, progress=progress), on_segment)

    def stream(
        self,
        source: Source | Samples,
        *,
        rate: int | None = None,
        track: int | None = None,
        progress: Progress | None = None,
    ) -> Generator[Segment, None, Transcription]:
        """As `transcribe`, but a generator: yields each segment when its text is final, returns the whole."""
        if isinstance(source, SAMPLE_TYPES):
            if track is not None:
                raise UsageError("track means nothing beside samples, which have one: leave it out")
            samples, rate = as_samples(source), checked_rate(SAMPLE_RATE if rate is None else rate)
            blocks, duration = array_blocks(samples, rate, self._note), len(samples) / rate
            return (yield from self._run(self._cutter.blocks(blocks, progress, duration)))
        if rate is not None:
            raise UsageError("rate means nothing beside a file, which has its own: leave it out")
        return (yield from self._run(self._cutter.file(source, track=track, progress=progress)))

    def run(
        self,
        blocks: Iterable[Samples],
        *,
        rate: int = SAMPLE_RATE,
        progress: Progress | None = None,
        duration_s: float | None = None,
        on_segment: OnSegment = lambda segment: None,
    ) -> Transcription:
        """As `transcribe`, for consecutive blocks of samples at `rate` Hz. duration_s: of all, for `progress`."""
        cuts = self._cutter.blocks(live_blocks(blocks, rate, self._note), progress, duration_s)
        return _drained(self._run(cuts), on_segment)

    def _run(self, cuts: Iterable[Cut]) -> Generator[Segment, None, Transcription]:
        """Yields segments whose text is final, returns the whole."""
        clock, found = time.perf_counter(), list[Segment]()
        for segment in finished((self.written(cut), cut.joined) for cut in cuts):
            found.append(segment)
            yield segment
        if not found:
            self._note("no speech was found")
        seconds = self._cutter.seconds
        result = transcription(found, self.task, seconds)
        return replace(result, rtf=(time.perf_counter() - clock) / seconds if seconds else 0.0)

    def segments(self, blocks: Iterable[Samples], rate: int = SAMPLE_RATE) -> Iterator[tuple[Segment, bool]]:
        """Yields (segment, joined) as segments end. joined: the segment before has heard its first words too.

        blocks, rate: as in `run`.
        """
        cuts = self._cutter.blocks(live_blocks(blocks, rate, self._note))
        return ((self.written(cut), cut.joined) for cut in cuts)

    def written(self, cut: Cut) -> Segment:
        """Transcribe one cut."""
        text, translation, note = self.text(cut.samples)
        if note == "empty":
            self._note(no_text(cut.start, cut.end))
        return Segment(cut.start, cut.end, text, translation, note)

    def text(self, samples: np.ndarray) -> tuple[str, str | None, str | None]:
        """Transcribe one segment: float32 [n], at most 30 s. Returns (text, translation, note), as in `Segment`.

        After a loop, or a text that is far too short, it is tried once more in halves. If there is no text at all, it
        is tried once more with silence around it.
        """
        text, translation, looped = self._try(samples)
        seconds = len(samples) / SAMPLE_RATE
        enough = _LEAST_CHARACTERS * seconds
        if seconds > _SPLIT_FROM_S and (looped or len(text) < enough):
            middle = quietest(samples)
            (a, a_translated, a_looped), (b, b_translated, b_looped) = (
                self._try(half, again=True) for half in (samples[:middle], samples[middle:])
            )
            if looped or len(a + b) >= enough:
                text, looped = glue(a, b), a_looped or b_looped
                translation = glue(a_translated or "", b_translated or "") if self.task.translate_to else None
        if not text and not translation:
            padding = _PADDING[: (MAX_SAMPLES - len(samples)) // 2]
            text, translation, looped = self._try(np.concatenate([padding, samples, padding]))
        return text, translation, "looped" if looped else None if text or translation else "empty"

    def _try(self, samples: np.ndarray, *, again: bool = False) -> tuple[str, str | None, bool]:
        self.scribe.begin(again=again)
        self.scribe.hear(self._encoder.encode(samples))
        if not self.scribe.heard:
            return "", None, False
        for _ in self.scribe.write(reply_limit(self.scribe.heard, self.task)):
            pass
        reply = self.scribe.last
        assert reply is not None
        return *self.task.read(reply.text), reply.looped


def _drained(written: Generator[Segment, None, Transcription], on_segment: OnSegment) -> Transcription:
    while True:
        try:
            segment = next(written)
        except StopIteration as end:
            result: Transcription = end.value
            return result
        on_segment(segment)


def finished(written: Iterable[tuple[Segment, bool]]) -> Iterator[Segment]:
    """Yields the segments of a recording, in order, with the words at their seams in one of them each.

    written: (segment, joined) as `Transcriber.segments` yields them.
    """
    last: Segment | None = None
    for segment, joined in written:
        if last is not None:
            if joined:
                last, segment = joined_pair(last, segment)
            yield last
        last = segment
    if last is not None:
        yield last


def transcription(segments: Sequence[Segment], task: Task, duration_s: float) -> Transcription:
    """The whole of a recording whose segments are `finished`. Its `rtf` is 0."""
    translated = glued([segment.translation or "" for segment in segments]) if task.translate_to else None
    return Transcription(
        text=glued([segment.text for segment in segments]),
        segments=tuple(segments),
        language=task.language,
        duration_s=duration_s,
        rtf=0.0,
        translation=translated,
        translate_to=task.translate_to,
    )


def no_text(start: float, end: float) -> str:
    """The note about speech that gave no text. start, end: seconds."""
    return f"what was heard from {start:.1f} to {end:.1f} s gave no text"


def reply_limit(soft_tokens: int, task: Task) -> int:
    """The most tokens of a reply: one for each soft token, as nobody speaks a token every 40 ms."""
    return (soft_tokens + 32) * (2 if task.translate_to else 1)


def joined_pair(before: Segment, after: Segment) -> tuple[Segment, Segment]:
    """Remove from two segments the words that both have heard at their seam: each stays in one of them."""
    first, second = seam(before.text, after.text)
    before, after = replace(before, text=first), replace(after, text=second)
    if before.translation and after.translation:
        first, second = seam(before.translation, after.translation)
        before, after = replace(before, translation=first), replace(after, translation=second)
    return before, after


def quietest(samples: np.ndarray) -> int:
    """The index of the middle of the quietest 32 ms within the middle half of float32 [n]."""
    return quietest_moment(samples, len(samples) // 4 // WINDOW * WINDOW, len(samples) * 3 // 4, WINDOW)


def subtitles(segments: Sequence[Segment]) -> str:
    """SubRip subtitles: of the translation if there is one. Times within a segment are proportional to characters."""
    cues = enumerate(_cues(segments), 1)
    return "".join(f"{i}\n{_clock(a)} --> {_clock(b)}\n{text}\n\n" for i, (a, b, text) in cues)


def webvtt(segments: Sequence[Segment]) -> str:
    """As `subtitles`, in the form of WebVTT (w3.org/TR/webvtt1): what could be markup is escaped."""
    cues = (f"{_clock(a, '.')} --> {_clock(b, '.')}\n{_escaped(text)}\n\n" for a, b, text in _cues(segments))
    return "WEBVTT\n\n" + "".join(cues)


def _cues(segments: Sequence[Segment]) -> Iterator[tuple[float, float, str]]:
    """Yields (start, end, text) in seconds; the text is a line of at most _CUE_CHARACTERS."""
    for segment in segments:
        text = segment.translation or segment.text
        at = 0
        for line in _lines(text):
            span = (segment.end - segment.start) / max(len(text), 1)
            yield segment.start + at * span, segment.start + (at + len(line)) * span, line
            at += len(line) + 1


def _lines(text: str) -> list[str]:
    """The text in lines of at most _CUE_CHARACTERS, broken between words where possible."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= _CUE_CHARACTERS:
            lines[-1] += " " + word
        else:
            lines += [word[i : i + _CUE_CHARACTERS] for i in range(0, len(word), _CUE_CHARACTERS)]
    return lines


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _clock(seconds: float, point: str = ",") -> str:
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{point}{ms % 1000:03}"
