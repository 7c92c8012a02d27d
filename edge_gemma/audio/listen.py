"""Live speech: sound is encoded and prefilled while it arrives, so that at its end only the closing tokens are left.

Owns: the order of work while someone speaks, and the events that come of it. Does not know: where the sound comes from
(mic.py, or any iterable of blocks).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from edge_gemma.audio import segments as cut
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.mic import Microphone
from edge_gemma.audio.prompts import Task, audio_prompt
from edge_gemma.audio.samples import Note, Samples, checked_rate, live_blocks, silent
from edge_gemma.audio.scribe import STEP_MS, Scribe, SpeechEngine, Stream
from edge_gemma.audio.texts import go_on, hold_back
from edge_gemma.audio.transcribe import Transcriber, reply_limit
from edge_gemma.audio.vad import Detector, open_detector
from edge_gemma.chat import Message
from edge_gemma.errors import UsageError
from edge_gemma.sampler import Sampling


@dataclass(frozen=True)
class Event:
    """What happened.

    kind: "speech", someone began to speak; "text", a piece of a reply as it is written; "segment", a whole one, with
    `start` and `end` of what was said in seconds and, where asked for, its `translation`; "notice", for the user.
    first_token_s: of a segment, from its end to the first token of its text.
    """

    kind: Literal["speech", "text", "segment", "notice"]
    text: str = ""
    start: float = 0.0
    end: float = 0.0
    translation: str | None = None
    first_token_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what an event of its kind does not have is left out."""
        has = {"speech": ("start",), "text": ("text",), "notice": ("text",), "segment": ("text", "start", "end")}
        entry = {"kind": self.kind} | {name: getattr(self, name) for name in has[self.kind]}
        extra = {"translation": self.translation, "first_token_s": self.first_token_s}
        return entry | {name: value for name, value in extra.items() if value is not None}


class Listener:
    """Writes down, or answers, what is said. `events` may be called again for another stream."""

    def __init__(
        self,
        engine: SpeechEngine,
        task: Task | None = None,
        *,
        ask: bool = False,
        system: str | None = None,
        num_beams: int | None = None,
        max_tokens: int | None = None,
        rules: cut.Rules = cut.LIVE_RULES,
        detector: Callable[[], Detector] | None = None,
        note: Note = silent,
    ) -> None:
        """ask: the model answers, each utterance by itself, after `system`, sampled as its generation_config says.

        num_beams: hypotheses of a text kept side by side, None for the checkpoint's own number.
        Raises UsageError for a model that was not made for speech.
        """
        self.task, self._rules, self._note = task or Task(), rules, note
        if ask and self.task != Task():
            raise UsageError("language and translate_to mean nothing beside ask: say it in system, or leave them out")
        if system is not None and not ask:
            raise UsageError("system means nothing without ask: leave it out")
        self._detector = detector or (lambda: open_detector(note))
        self._encoder = engine.audio
        self._transcriber: Transcriber | None = None
        self._max_tokens = max_tokens
        if ask:
            earlier = [Message("system", system)] if system else []
            prompt = audio_prompt(engine.chat_template, engine.tokenizer, "", earlier=earlier)
            sampling = Sampling.from_generation_config(engine.generation_config, num_beams=num_beams)
            self._scribe = Scribe(engine, prompt, sampling=sampling, context=engine.context)
        else:
            self._transcriber = Transcriber(engine, self.task, num_beams=num_beams, note=note)
            self._scribe = self._transcriber.scribe
        self._last, self._held = "", ""  # of a segment cut in speech: its text, and the last word, not told yet

    def events(self, blocks: Iterable[Samples], rate: int = SAMPLE_RATE) -> Iterator[Event]:
        """blocks: samples as they arrive, each as `samples.as_samples` takes it, `rate` a second. Ends when they do.

        Raises UsageError for what is no samples.
        """
        segmenter, stream = cut.Segmenter(self._detector(), self._rules), None
        heard: list[np.ndarray] = []
        for step in segmenter.steps(live_blocks(blocks, rate, self._note)):
            if isinstance(step, cut.Opened):
                stream, heard = self._encoder.stream(STEP_MS), []
                self._scribe.begin()
                yield Event("speech", start=step.start / SAMPLE_RATE)
            elif isinstance(step, cut.Heard):
                assert stream is not None
                heard.append(step.samples)
                self._scribe.hear(stream.feed(step.samples))
            elif step.segment.speech:
                assert stream is not None
                yield from self._reply(step.segment, stream, np.concatenate(heard))
                stream, heard = None, []

    def _reply(self, segment: cut.Segment, stream: Stream, heard: np.ndarray) -> Iterator[Event]:
        start = time.perf_counter()
        scribe, limit = self._scribe, self._max_tokens
        scribe.hear(stream.finish())
        if not scribe.heard:
            return
        if self._transcriber is not None:
            limit = min(limit or 10**9, reply_limit(scribe.heard, self.task))
        for piece in scribe.write(limit, since=start):
            yield Event("text", piece)
        assert scribe.last is not None
        first, text, translation = scribe.last.first_token_s, scribe.last.text, None
        if self._transcriber is not None:
            text, translation = self.task.read(text)
            if scribe.last.looped or not text:
                text, translation, _ = self._transcriber.text(heard)
            text = self._told(segment, text)
        yield Event("segment", text, segment.start / SAMPLE_RATE, segment.end / SAMPLE_RATE, translation, first)

    def _told(self, segment: cut.Segment, text: str) -> str:
        """The segment's text with the words left out that the segment before had, and with the one it held back."""
        if segment.joined:
            text = go_on(self._last, self._held, text)
        if segment.cut:
            text, self._held = hold_back(text)
            self._last = text
        return text


def listen(
    engine: SpeechEngine,
    blocks: Iterable[Samples] | None,
    task: Task,
    *,
    rate: int | None = None,
    device: int | str | None = None,
    ask: bool = False,
    system: str | None = None,
    num_beams: int | None = None,
) -> Iterator[Event]:
    """See `Engine.listen`."""
    if blocks is not None and device is not None:
        raise UsageError("device means nothing beside blocks, which come from elsewhere: leave one of them out")
    if blocks is None and rate is not None:
        raise UsageError("rate means nothing without blocks, a microphone has its own: leave it out")
    rate = checked_rate(SAMPLE_RATE if rate is None else rate)
    notes: deque[str] = deque()
    listener = Listener(engine, task, ask=ask, system=system, num_beams=num_beams, note=notes.append)
    return _with_notes(listener, blocks, rate, device, notes)


def _with_notes(
    listener: Listener, blocks: Iterable[Samples] | None, rate: int, device: int | str | None, notes: deque[str]
) -> Iterator[Event]:
    with Microphone(device, notes.append) if blocks is None else nullcontext(blocks) as source:
        for event in listener.events(source, rate):
            while notes:
                yield Event("notice", notes.popleft())
            yield event
    for text in notes:
        yield Event("notice", text)
