"""Live speech: sound is encoded and prefilled while it arrives, so that at its end only the closing tokens are left.

Owns: the order of work while someone speaks, and the events that come of it. An utterance is either transcribed
(recogniser.py) or it is the next message of a chat (spoken.py). Does not know: where the sound comes from (mic.py, or
any iterable of blocks).
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edge_gemma.arguments import require
from edge_gemma.audio import segments as cut
from edge_gemma.audio.ears import Ears
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.floor import Floor, Speaking
from edge_gemma.audio.gates import Gate, WakeWord, gated, live_gates
from edge_gemma.audio.levels import QUIET_DB, louder, loudest_db
from edge_gemma.audio.mic import Microphone
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.recogniser import (
    SEGMENT_TOKENS,
    STEP_MS,
    Scribe,
    SpeechEngine,
    Stream,
    Written,
    check_context,
    without_loop,
)
from edge_gemma.audio.samples import Note, Samples, checked_rate, live_blocks, silent
from edge_gemma.audio.seams import Telling, loop
from edge_gemma.audio.sources import Source
from edge_gemma.audio.spoken import SpokenTurn
from edge_gemma.audio.transcribe import Transcriber, no_text, reply_limit
from edge_gemma.audio.vad import Detector, open_detector
from edge_gemma.chat import Chat
from edge_gemma.errors import UsageError
from edge_gemma.generation.reply import Reply
from edge_gemma.generation.sampler import Sampling
from edge_gemma.tools.assistant import Assistant

_CLOSING = 32  # tokens from the end of a sound to the reply, at most


@dataclass(frozen=True)
class Event:
    """Something that happened while listening.

    kind: "speech", someone began to speak; "text", a piece of a reply as it is written; "segment", a whole reply, with
    `start` and `end` of the speech in seconds and, where asked for, its `translation`; "notice", for the user.
    first_token_s: of a segment, the seconds from the end of the speech to the first token of its text.
    reply: of a segment that was answered, the whole reply with its tool calls. None for a transcription.
    interrupted: of a segment, that the answer was cut off because somebody spoke; `text` is what was said of it.
    first_sound_s: of a segment that is answered aloud, the seconds from the end of the speech to the first sound.
    """

    kind: Literal["speech", "text", "segment", "notice"]
    text: str = ""
    start: float = 0.0
    end: float = 0.0
    translation: str | None = None
    first_token_s: float | None = None
    reply: Reply | None = None
    interrupted: bool = False
    first_sound_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON; those that its kind of event does not have are left out."""
        has = {"speech": ("start",), "text": ("text",), "notice": ("text",), "segment": ("text", "start", "end")}
        entry = {"kind": self.kind} | {name: getattr(self, name) for name in has[self.kind]}
        extra = {name: getattr(self, name) for name in ("translation", "first_token_s", "first_sound_s", "interrupted")}
        return entry | {name: value for name, value in extra.items() if value not in (None, False)}


class Listener:
    """Transcribes or answers what is said. `events` may be called again for another stream."""

    def __init__(
        self,
        engine: SpeechEngine,
        task: Task | None = None,
        *,
        ask: bool = False,
        system: str | None = None,
        chat: Chat | Assistant | None = None,
        act: Callable[[Chat], Assistant | None] | None = None,
        num_beams: int | None = None,
        max_tokens: int | None = None,
        rules: cut.Rules = cut.LIVE_RULES,
        detector: Callable[[], Detector] | None = None,
        note: Note = silent,
        live: bool = False,
        speaker: Speaking | None = None,
        gates: Sequence[Gate] = (),
    ) -> None:
        """ask: a new chat answers, after `system`, with the checkpoint's settings. act: given that chat, makes the
        assistant that runs its tools.

        chat: this chat answers, each utterance as its next message, with its own settings; of an Assistant, its tools
        are run. num_beams: the hypotheses that the beam search keeps, None for the checkpoint's own number.

        live: blocks come as they are spoken, and somebody who speaks while the model answers interrupts it. They are
        read in a thread of their own then. speaker: says the answers. gates: what is not heard (gates.py). Raises
        UsageError for a model that was not made for speech, and for arguments that mean nothing together.
        """
        require("ask", ask, isinstance(ask, bool), "True or False")
        self.task, self._rules, self._note = task or Task(), rules, note
        if ask and self.task != Task():
            raise UsageError("language and translate_to mean nothing beside ask: say it in system, or leave them out")
        if system is not None and not ask:
            raise UsageError("system means nothing without ask: leave it out")
        assistant = chat if isinstance(chat, Assistant) else None
        if isinstance(chat, Assistant):
            chat = chat.chat
        good = chat is None or (isinstance(chat, Chat) and chat.belongs_to(engine))
        require("chat", chat, good, "a Chat of this engine: engine.chat() makes one")
        if chat is not None and (ask or self.task != Task() or num_beams is not None):
            raise UsageError("ask, language, translate_to and num_beams mean nothing beside chat: leave them out")
        self._detector = detector or (lambda: open_detector(note))
        self._encoder = engine.audio
        self._transcriber: Transcriber | None = None
        self._max_tokens = max_tokens
        self._scribe: Scribe | SpokenTurn
        self._questions: Chat | None = None  # a chat that nobody else can stop
        if ask:
            sampling = Sampling.from_generation_config(engine.generation_config, num_beams=num_beams)
            self._questions = chat = Chat(engine, system=system, sampling=sampling, max_tokens=max_tokens)
            assistant = act(chat) if act else None
            chat.begin_sound(1)  # the system prompt, before anybody speaks
            check_context(engine.context, chat.session.position + SEGMENT_TOKENS + _CLOSING)
        if chat is not None:
            self._scribe = SpokenTurn(chat, note, assistant)
        else:
            self._transcriber = Transcriber(engine, self.task, num_beams=num_beams, note=note)
            self._scribe = self._transcriber.scribe
        if speaker is not None and chat is None:
            raise UsageError("nothing is said aloud without ask or chat: leave it out")
        self._live, self._speaker, self._gates = live and chat is not None, speaker, list(gates)
        self._written_text = ""  # of the present answer, with what was said between calls
        self._floor = Floor(self._stop, speaker)
        self._texts, self._translations = Telling(), Telling()
        self._quiet = False  # that the sound is very quiet was told

    def events(self, blocks: Iterable[Samples], rate: int = SAMPLE_RATE) -> Iterator[Event]:
        """blocks: samples as they arrive, each as `samples.as_samples` takes it, `rate` a second. Ends when they do.

        Raises UsageError for what is no samples.
        """
        stream: Stream | None = None
        heard: list[np.ndarray] = []
        start, again = 0, 0  # where the utterance began; samples of it that a cut has heard twice
        for step in self._steps(live_blocks(blocks, rate, self._note)):
            if isinstance(step, cut.Opened) and stream is None:
                stream, heard, start, again = self._encoder.stream(STEP_MS), [], step.start, 0
                self._keep_what_was_heard()
                self._scribe.begin()
                yield Event("speech", start=step.start / SAMPLE_RATE)
            elif isinstance(step, cut.Heard):
                assert stream is not None
                heard.append(step.samples[again:])
                again = max(0, again - len(step.samples))
                self._scribe.hear(stream.feed(heard[-1]))
            elif isinstance(step, cut.Closed) and step.segment.speech:
                assert stream is not None
                if (step.segment.cut or not self._floor.answer()) and self._goes_on(stream):
                    stream, again = self._encoder.stream(STEP_MS), cut.OVERLAP if step.segment.cut else 0
                    continue
                yield from self._reply(replace(step.segment, start=start), stream, np.concatenate(heard))
                stream = None
                self._floor.answered()

    def _steps(self, blocks: Iterable[np.ndarray]) -> Iterator[cut.Step]:
        """What is heard, step by step. Live, it is noticed as it comes."""
        heard = gated(blocks, self._gates, pause_s=self._rules.pause_s, busy=lambda: self._floor.busy)
        steps = cut.Segmenter(self._detector(), self._rules).steps(heard)
        if not self._live:
            yield from steps
            return
        for step in Ears(steps, self._floor.noticed):
            self._floor.taken(step)
            yield step

    def interrupt(self) -> None:
        """End the answer that is written or said, from any thread, as somebody who speaks does."""
        self._floor.interrupt()

    def _stop(self) -> None:
        if isinstance(self._scribe, SpokenTurn):
            self._scribe.stop()

    def _keep_what_was_heard(self) -> None:
        """Of an answer that was cut off, the conversation keeps what was heard; without a speaker what was written."""
        if self._floor.interrupted and isinstance(self._scribe, SpokenTurn):
            heard = self._written_text if self._speaker is None else self._speaker.heard
            self._scribe.keep(len(self._written_text) - len(heard))
        self._floor.interrupted = False

    def _goes_on(self, stream: Stream) -> bool:
        """Whether the utterance goes on in another clip of the same turn. A transcription is cut into segments."""
        if not isinstance(self._scribe, SpokenTurn):
            return False
        context = self._scribe.session.context
        if self._scribe.room_for_clip(min(self._max_tokens or context, context // 4)):
            self._scribe.hear(stream.finish())
            self._scribe.next_clip()
            return True
        self._note("this is longer than the context holds: it is answered in parts")
        return False

    def _reply(self, segment: cut.Span, stream: Stream, heard: np.ndarray) -> Iterator[Event]:
        begun, start, end = time.perf_counter(), segment.start / SAMPLE_RATE, segment.end / SAMPLE_RATE
        self._scribe.hear(stream.finish())
        if not self._scribe.heard:
            return
        quiet = self._tell_quiet(heard)
        if self._transcriber is None:
            yield from self._written(self._max_tokens, begun)
            text, translation, first = self._answered, None, self._last.first_token_s
        else:
            text, translation, first = yield from self._transcribed(self._transcriber, heard, quiet, begun)
            text = self._texts.next(text, joined=segment.joined, cut=segment.cut)
            translation = self._translations.next(translation or "", joined=segment.joined, cut=segment.cut) or None
        if not text and not segment.cut and not (self._answer and self._answer.tool_calls):
            self._note(no_text(start, end))
        sound = self._speaker.first_sound_at if self._speaker is not None else None
        yield Event(
            "segment", text, start, end, translation, first, self._answer, self._floor.interrupted,
            None if sound is None else sound - begun,
        )  # fmt: skip

    def _transcribed(
        self, transcriber: Transcriber, heard: np.ndarray, quiet: bool, begun: float
    ) -> Generator[Event, None, tuple[str, str | None, float]]:
        """A segment's text, its translation, and the seconds to its first token. Very quiet sound is made louder."""
        if quiet:
            text, translation, _ = transcriber.text(louder(heard, loudest_db(heard)))
            return text, translation, time.perf_counter() - begun
        limit = min(self._max_tokens or 10**9, reply_limit(self._scribe.heard, self.task))
        yield from self._written(limit, begun)
        text, translation = self.task.read(self._last.text)
        first = self._last.first_token_s
        if self._last.looped or not text:
            text, translation, _ = transcriber.text(heard)
        return text, translation, first

    def _written(self, limit: int | None, begun: float) -> Iterator[Event]:
        """The pieces of a text, as events. A listener that is left in the middle ends the reply of its chat."""
        self._written_text = ""
        if self._speaker is not None:
            self._speaker.begin()
        try:
            for piece in self._scribe.write(limit, since=begun):
                self._written_text += piece
                if self._speaker is not None:
                    self._speaker.say(piece)
                yield Event("text", piece)
                if self._questions is not None and self._repeated:
                    self._questions.stop()
            if self._speaker is not None:
                self._speaker.finish()
        finally:
            self._stop()

    @property
    def _answer(self) -> Reply | None:
        """The chat's reply to the last utterance, None without a chat."""
        return self._scribe.reply if isinstance(self._scribe, SpokenTurn) else None

    @property
    def _repeated(self) -> int:
        """How many of the answer's last tokens only repeat what stands before them."""
        return loop(self._answer.so_far.tokens) if self._answer else 0

    @property
    def _answered(self) -> str:
        """The answer's text: of one that was cut off what was heard; what only repeats itself is left out."""
        if self._floor.interrupted and self._speaker is not None:
            return self._speaker.heard
        if self._questions is None or self._answer is None:
            return self._last.text
        return without_loop(self._answer.so_far, self._repeated, self._questions.tokenizer)

    @property
    def _last(self) -> Written:
        assert self._scribe.last is not None
        return self._scribe.last

    def _tell_quiet(self, heard: np.ndarray) -> bool:
        """Whether a segment is very quiet. The user is told once."""
        quiet = (loudest := loudest_db(heard)) < QUIET_DB
        if quiet and not self._quiet:
            self._quiet = True
            self._note(f"the sound is very quiet, {loudest:.0f} dB of full scale at its loudest: speak closer")
        return quiet


def listen(
    engine: SpeechEngine,
    blocks: Iterable[Samples] | Source | None,
    task: Task,
    *,
    rate: int | None = None,
    device: int | str | None = None,
    ask: bool = False,
    system: str | None = None,
    chat: Chat | Assistant | None = None,
    num_beams: int | None = None,
    speaker: Speaking | None = None,
    full_duplex: bool = False,
    wake_word: WakeWord | str | None = None,
) -> Iterator[Event]:
    """See `Engine.listen`."""
    if blocks is not None and device is not None:
        raise UsageError("device means nothing beside blocks, which come from elsewhere: leave one of them out")
    if blocks is None and rate is not None:
        raise UsageError("rate means nothing without blocks, a microphone has its own: leave it out")
    if _is_file(blocks) and rate is not None:
        raise UsageError("rate means nothing beside a file, which has its own: leave it out")
    rate = checked_rate(SAMPLE_RATE if rate is None else rate)
    notes: deque[str] = deque()
    require("full_duplex", full_duplex, isinstance(full_duplex, bool), "True or False")
    if full_duplex and speaker is None:
        raise UsageError("full_duplex means nothing without a speaker: leave it out")
    listener = Listener(
        engine, task, ask=ask, system=system, chat=chat, num_beams=num_beams, note=notes.append,
        live=blocks is None or speaker is not None, speaker=speaker,
        gates=live_gates(speaker, full_duplex=full_duplex, wake_word=wake_word),
    )  # fmt: skip
    return _with_notes(listener, blocks, rate, device, notes)


def _is_file(blocks: Any) -> bool:
    return isinstance(blocks, str | Path | bytes) or callable(getattr(blocks, "read", None))


def _opened(blocks: Any, device: int | str | None, note: Note) -> AbstractContextManager[Iterable[Samples]]:
    if blocks is None:
        return Microphone(device, note)
    return AudioFile(blocks, note) if _is_file(blocks) else nullcontext(blocks)


def _with_notes(
    listener: Listener,
    blocks: Iterable[Samples] | Source | None,
    rate: int,
    device: int | str | None,
    notes: deque[str],
) -> Iterator[Event]:
    with _opened(blocks, device, notes.append) as source:
        for event in listener.events(source, rate):
            while notes:
                yield Event("notice", notes.popleft())
            yield event
    for text in notes:
        yield Event("notice", text)
