"""Speech that is written down while it is spoken, segment by segment.

Owns: the events of a transcription; what is tried again (very quiet sound, a text that repeats itself). Does not know:
where segments end, how a text is written (recogniser.py).
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np

from edge_gemma.audio.events import Event
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.floor import Floor
from edge_gemma.audio.levels import louder, loudest_db
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.recogniser import SpeechEngine, Stream
from edge_gemma.audio.samples import Note
from edge_gemma.audio.seams import Telling
from edge_gemma.audio.segments import Span
from edge_gemma.audio.transcribe import Transcriber, no_text, reply_limit


@dataclass(frozen=True)
class Utterance:
    """What was said. heard: its samples, float32 [n] of 16 kHz; quiet: whether they are very quiet. since: when it
    ended, by time.perf_counter. more: whether the speaker goes on already.
    """

    segment: Span
    heard: np.ndarray
    quiet: bool
    since: float
    more: bool = False


class Dictation:
    """Writes down one segment after another. For each: `begin`, `hear` any number of times, `reply`."""

    def __init__(
        self, engine: SpeechEngine, task: Task, *, num_beams: int | None, max_tokens: int | None, note: Note
    ) -> None:
        """Raises as `Transcriber`."""
        self.floor = Floor(lambda: None)
        self._task, self._max_tokens, self._note = task, max_tokens, note
        self._transcriber = Transcriber(engine, task, num_beams=num_beams, note=note)
        self._scribe = self._transcriber.scribe
        self.begin, self.hear, self.guess = self._scribe.begin, self._scribe.hear, self._scribe.guess
        self._texts, self._translations = Telling(), Telling()

    @property
    def heard(self) -> int:
        """Soft tokens of the segment so far."""
        return self._scribe.heard

    @property
    def guesses(self) -> bool:
        """Whether `guess` is of use now."""
        return self._scribe.guesses

    def goes_on(self, stream: Stream) -> bool:
        """A segment never goes on in another clip."""
        return False

    def reply(self, said: Utterance) -> Iterator[Event]:
        """Yields the text of a segment in pieces, then whole."""
        segment = said.segment
        text, translation, first = yield from self.text(said)
        start, end = segment.start / SAMPLE_RATE, segment.end / SAMPLE_RATE
        if not text and not segment.cut:
            self._note(no_text(start, end))
        yield Event("segment", text, start, end, translation, first, goes_on=segment.cut)

    def text(self, said: Utterance) -> Generator[Event, None, tuple[str, str | None, float]]:
        """A segment's text, its translation, and the seconds to its first token.

        What a cut has heard twice stands in one of the texts (seams.py).
        """
        text, translation, first = yield from self._written(said)
        joined, cut = said.segment.joined, said.segment.cut
        text = self._texts.next(text, joined=joined, cut=cut)
        return text, self._translations.next(translation or "", joined=joined, cut=cut) or None, first

    def _written(self, said: Utterance) -> Generator[Event, None, tuple[str, str | None, float]]:
        """As `text`, of the whole segment. Very quiet sound is made louder."""
        heard = said.heard
        if said.quiet:
            text, translation, _ = self._transcriber.text(louder(heard, loudest_db(heard)))
            return text, translation, time.perf_counter() - said.since
        limit = min(self._max_tokens or 10**9, reply_limit(self.heard, self._task))
        for piece in self._scribe.write(limit, since=said.since):
            yield Event("text", piece)
        written = self._scribe.last
        assert written is not None
        text, translation = self._task.read(written.text)
        if written.looped or not text:
            text, translation, _ = self._transcriber.text(heard)
        return text, translation, written.first_token_s
