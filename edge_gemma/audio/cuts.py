"""Recordings cut into segments of speech, each with the sound that is heard of it.

Owns: the way from a file or samples to cuts (`Cutter`): the level, the detector, the choice of a track that has speech.
Does not know: where segments begin and end (segments.py), formats (files.py), what is done with a cut.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.levels import levelled
from edge_gemma.audio.samples import Note, silent
from edge_gemma.audio.segments import FILE_RULES, Heard, Opened, Rules, Segmenter
from edge_gemma.audio.vad import Detector, open_detector
from edge_gemma.host.sources import Source

_OTHER_TRACKS = 7  # tracks of a file that are tried if the first has no speech

Progress = Callable[[float, float | None], None]  # (seconds done, seconds in all or None)


@dataclass(frozen=True)
class Cut:
    """A segment of speech. start, end: seconds of the recording. samples: float32 [n] of 16 kHz, at most 30 s.

    joined: it begins without a pause after the one before, and hears the last words of that one again.
    """

    start: float
    end: float
    joined: bool
    samples: np.ndarray


class Cutter:
    """Cuts one recording after another."""

    def __init__(
        self, rules: Rules = FILE_RULES, detector: Callable[[], Detector] | None = None, note: Note = silent
    ) -> None:
        """detector: makes one for each recording, None for Silero. note: called with what the user should know."""
        self._rules, self._note = rules, note
        self._detector = detector or (lambda: open_detector(note))
        self.seconds = 0.0  # of the present recording, as far as it was read

    def file(self, source: Source, *, track: int | None = None, progress: Progress | None = None) -> Iterator[Cut]:
        """Cut a file, as `AudioFile` takes it. track: as in `Transcriber.transcribe`.

        Raises AudioError for sound that cannot be read, UsageError if there is no such track.
        """
        with AudioFile(source, self._note, track=track) as file:
            found = False
            for cut in self.blocks(file, progress, file.duration_s):
                found = True
                yield cut
            others = [number for number in range(1, file.tracks + 1) if number != file.track and track is None]
            for number in others[:_OTHER_TRACKS]:
                if found:
                    break
                self._note(f"{file.name}: no speech was found in track {file.track}: track {number} is tried")
                file.read_track(number)
                for cut in self.blocks(file, progress, file.duration_s):
                    found = True
                    yield cut

    def blocks(
        self, blocks: Iterable[np.ndarray], progress: Progress | None = None, duration_s: float | None = None
    ) -> Iterator[Cut]:
        """Cut consecutive blocks: float32 [n] of 16 kHz mono. duration_s: of all, for `progress`."""
        samples = 0
        self.seconds = 0.0

        def counted() -> Iterator[np.ndarray]:
            nonlocal samples
            for block in blocks:
                samples += len(block)
                self.seconds = samples / SAMPLE_RATE
                yield block
                if progress:
                    progress(self.seconds, duration_s)

        heard: list[np.ndarray] = []
        for step in Segmenter(self._detector(), self._rules).steps(levelled(counted(), self._note)):
            if isinstance(step, Opened):
                heard = []
            elif isinstance(step, Heard):
                heard.append(step.samples)
            elif step.segment.speech:
                span, sound = step.segment, np.concatenate(heard)
                if not span.cut:  # only the pause follows its end
                    sound = sound[: span.end - span.heard_from]
                yield Cut(span.start / SAMPLE_RATE, span.end / SAMPLE_RATE, span.joined, sound)
                heard = []
