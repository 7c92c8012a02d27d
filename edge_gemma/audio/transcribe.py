"""Recorded speech to text: any length, in segments.

Owns: the way from blocks of sound to a `Transcription` (segments, retries, joining) and to subtitles. Does not know:
file formats (files.py), where segments begin and end (segments.py), how a session is driven (recogniser.py).
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edge_gemma.audio.features import MAX_SAMPLES, SAMPLE_RATE
from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.levels import levelled, quietest_moment
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
from edge_gemma.audio.segments import FILE_RULES, Heard, Opened, Rules, Segmenter, Span
from edge_gemma.audio.vad import WINDOW, Detector, open_detector
from edge_gemma.errors import UsageError
from edge_gemma.host.sources import Source

_SPLIT_FROM_S = 8.0  # seconds: a longer segment that fails is tried again in halves
_LEAST_CHARACTERS = 1.0  # for a second of speech; English has about 14, Chinese 4
_PADDING = np.zeros(SAMPLE_RATE // 2, np.float32)  # silence around a segment that gave no text, for the second try
_OTHER_TRACKS = 7  # tracks of a file that are tried if the first has no speech
_CUE_CHARACTERS = 84  # characters of a subtitle: two lines

Progress = Callable[[float, float | None], None]  # (seconds done, seconds in all or None)


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
        self.task = task or Task()
        self._rules, self._note = rules, note
        self._detector = detector or (lambda: open_detector(note))
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
            return self._told((yield from self._run(blocks, progress, duration)))
        if rate is not None:
            raise UsageError("rate means nothing beside a file, which has its own: leave it out")
        with AudioFile(source, self._note, track=track) as file:
            result = yield from self._run(file, progress, file.duration_s)
            others = [number for number in range(1, file.tracks + 1) if number != file.track and track is None]
            for number in others[:_OTHER_TRACKS]:
                if result.segments:
                    break
                self._note(f"{file.name}: no speech was found in track {file.track}: track {number} is tried")
                file.read_track(number)
                result = yield from self._run(file, progress, file.duration_s)
        return self._told(result)

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
        written = self._run(live_blocks(blocks, rate, self._note), progress, duration_s)
        return self._told(_drained(written, on_segment))

    def _told(self, result: Transcription) -> Transcription:
        if not result.segments:
            self._note("no speech was found")
        return result

    def _run(
        self,
        blocks: Iterable[np.ndarray],
        progress: Progress | None,
        duration_s: float | None,
    ) -> Generator[Segment, None, Transcription]:
        """Yields segments whose text is final, returns the whole. blocks: float32 [n] of 16 kHz mono."""
        clock, samples = time.perf_counter(), 0
        found: list[Segment] = []

        def counted() -> Iterator[np.ndarray]:
            nonlocal samples
            for block in blocks:
                samples += len(block)
                yield block
                if progress:
                    progress(samples / SAMPLE_RATE, duration_s)

        for segment, joined in self._segments(levelled(counted(), self._note)):
            if joined and found:
                found[-1], segment = joined_pair(found[-1], segment)
            if found:
                yield found[-1]
            found.append(segment)
        if found:
            yield found[-1]
        seconds, texts = samples / SAMPLE_RATE, [s.text for s in found]
        translated = glued([s.translation or "" for s in found]) if self.task.translate_to else None
        return Transcription(
            text=glued(texts),
            segments=tuple(found),
            language=self.task.language,
            duration_s=seconds,
            rtf=(time.perf_counter() - clock) / seconds if seconds else 0.0,
            translation=translated,
            translate_to=self.task.translate_to,
        )

    def segments(self, blocks: Iterable[Samples], rate: int = SAMPLE_RATE) -> Iterator[tuple[Segment, bool]]:
        """Yields (segment, joined) as segments end. joined: the segment before has heard its first words too.

        blocks, rate: as in `run`.
        """
        return self._segments(levelled(live_blocks(blocks, rate, self._note), self._note))

    def _segments(self, blocks: Iterable[np.ndarray]) -> Iterator[tuple[Segment, bool]]:
        heard: list[np.ndarray] = []
        for step in Segmenter(self._detector(), self._rules).steps(blocks):
            if isinstance(step, Opened):
                heard = []
            elif isinstance(step, Heard):
                heard.append(step.samples)
            elif step.segment.speech:
                yield self._written(step.segment, np.concatenate(heard)), step.segment.joined
                heard = []

    def _written(self, segment: Span, heard: np.ndarray) -> Segment:
        if not segment.cut:  # only the pause follows its end
            heard = heard[: segment.end - segment.heard_from]
        text, translation, note = self.text(heard)
        start, end = segment.start / SAMPLE_RATE, segment.end / SAMPLE_RATE
        if note == "empty":
            self._note(no_text(start, end))
        return Segment(start, end, text, translation, note)

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
