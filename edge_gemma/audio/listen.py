"""Live speech: sound is encoded and prefilled while it arrives, so that at its end only the closing tokens are left.

Owns: the order of work while someone speaks, and the events that come of it. An utterance is either transcribed
(recogniser.py) or it is the next message of a chat (spoken.py). Does not know: where the sound comes from (mic.py, or
any iterable of blocks).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.arguments import require
from edge_gemma.audio import segments as cut
from edge_gemma.audio.dictation import Dictation, Utterance
from edge_gemma.audio.ears import Ears
from edge_gemma.audio.events import Event
from edge_gemma.audio.features import SAMPLE_RATE
from edge_gemma.audio.files import AudioFile
from edge_gemma.audio.floor import Speaking
from edge_gemma.audio.gates import Gate, WakeWord, gated, live_gates
from edge_gemma.audio.levels import QUIET_DB, loudest_db
from edge_gemma.audio.mic import Microphone
from edge_gemma.audio.prompts import Task
from edge_gemma.audio.recogniser import (
    SEGMENT_TOKENS,
    STEP_MS,
    SpeechEngine,
    Stream,
    check_context,
)
from edge_gemma.audio.samples import Note, Samples, checked_rate, live_blocks, silent
from edge_gemma.audio.spare import Spare
from edge_gemma.audio.spoken import SpokenTurn, WrittenTurn
from edge_gemma.audio.talk import Talk
from edge_gemma.audio.vad import Detector, open_detector
from edge_gemma.chat import Chat
from edge_gemma.errors import UsageError
from edge_gemma.generation.sampler import Sampling
from edge_gemma.host.sources import Source
from edge_gemma.tools.assistant import Assistant

_CLOSING = 32  # tokens from the end of a sound to the reply, at most


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
        by_text: bool = False,
        pauses: bool = False,
    ) -> None:
        """ask: a new chat answers, after `system`, with the checkpoint's settings. act: given that chat, makes the
        assistant that runs its tools.

        chat: this chat answers, each utterance as its next message, with its own settings; of an Assistant, its tools
        are run. num_beams: the hypotheses that the beam search keeps, None for the checkpoint's own number.

        live: blocks come as they are spoken, and somebody who speaks while the model answers interrupts it. They are
        read in a thread of their own then. speaker: says the answers. gates: what is not heard (gates.py). by_text:
        each utterance is written down, and the chat answers the text. pauses: the end of an utterance is an event of
        its own, before anything is written.

        Raises UsageError for a model that was not made for speech, and for arguments that mean nothing together.
        """
        self.task, self._rules, self._note = task or Task(), rules, note
        assistant = chat if isinstance(chat, Assistant) else None
        chat = chat.chat if isinstance(chat, Assistant) else chat
        good = chat is None or (isinstance(chat, Chat) and chat.belongs_to(engine))
        require("chat", chat, good, "a Chat of this engine: engine.chat() makes one")
        own = {"ask": ask, "num_beams": num_beams is not None, "language or translate_to": self.task != Task()}
        _refuse_what_means_nothing(own, chat=chat is not None, system=system, speaker=speaker, by_text=by_text)
        self._detector, self._encoder = detector or (lambda: open_detector(note)), engine.audio
        if ask:
            sampling = Sampling.from_generation_config(engine.generation_config, num_beams=num_beams)
            chat = Chat(engine, system=system, sampling=sampling, max_tokens=max_tokens)
            assistant = act(chat) if act else None
            chat.begin_sound(1)  # the system prompt, before anybody speaks
            check_context(engine.context, chat.session.position + SEGMENT_TOKENS + _CLOSING)
        self._job: Dictation | Talk
        dictation = None
        if chat is None or by_text:
            self._job = dictation = Dictation(
                engine, self.task, num_beams=None if ask else num_beams, max_tokens=max_tokens, note=note
            )
        if chat is not None:
            turn = SpokenTurn(chat, note) if dictation is None else WrittenTurn(chat, note, dictation)
            self._job = Talk(chat, turn, note=note, assistant=assistant, speaker=speaker, own=ask)
        self._dictation, self._spare = dictation, Spare()
        self._live, self._gates = live and chat is not None, list(gates)
        self._pauses, self._floor = pauses, self._job.floor
        self._quiet = False  # that the sound is very quiet was told

    def events(self, blocks: Iterable[Samples], rate: int = SAMPLE_RATE) -> Iterator[Event]:
        """blocks: samples as they arrive, each as `samples.as_samples` takes it, `rate` a second. Ends when they do.

        Raises UsageError for what is no samples.
        """
        stream: Stream | None = None
        heard: list[np.ndarray] = []
        start, again = 0, 0  # where the utterance began; samples of it that a cut has heard twice
        for step in self._spare.waiting(self._steps(live_blocks(blocks, rate, self._note))):
            if isinstance(step, cut.Opened) and stream is None:
                stream, heard, start, again = self._encoder.stream(STEP_MS), [], step.start, 0
                self._job.begin()
                yield Event("speech", start=step.start / SAMPLE_RATE)
            elif isinstance(step, cut.Heard):
                assert stream is not None
                heard.append(step.samples[again:])
                again = max(0, again - len(step.samples))
                self._job.hear(stream.feed(heard[-1]))
                if self._dictation is not None and self._dictation.guesses:
                    self._spare.use(self._dictation.guess)
            elif isinstance(step, cut.Closed) and step.segment.speech:
                assert stream is not None
                more = step.segment.cut or not self._floor.answer()
                if more and self._job.goes_on(stream):
                    stream, again = self._encoder.stream(STEP_MS), cut.OVERLAP if step.segment.cut else 0
                    continue
                yield from self._reply(replace(step.segment, start=start), stream, np.concatenate(heard), more)
                stream = None
                self._floor.answered()

    def _steps(self, blocks: Iterable[np.ndarray]) -> Iterator[cut.Step]:
        """What is heard, step by step. Live, it is noticed as it comes."""
        self._floor.begin()
        if not self._live:
            yield from self._segmented(blocks)
            return
        for step in Ears(blocks, self._segmented, self._floor.noticed):
            self._floor.taken(step)
            yield step

    def _segmented(self, blocks: Iterable[np.ndarray]) -> Iterator[cut.Step]:
        heard = gated(blocks, self._gates, pause_s=self._rules.pause_s, busy=lambda: self._floor.busy)
        return cut.Segmenter(self._detector(), self._rules).steps(heard)

    def interrupt(self) -> None:
        """End the answer that is written or said, from any thread, as somebody who speaks does."""
        self._floor.interrupt()

    def _reply(self, segment: cut.Span, stream: Stream, heard: np.ndarray, more: bool) -> Iterator[Event]:
        since = time.perf_counter()
        if self._pauses:
            yield Event("pause", start=segment.start / SAMPLE_RATE, end=segment.end / SAMPLE_RATE)
        self._job.hear(stream.finish())
        if self._job.heard:
            yield from self._job.reply(Utterance(segment, heard, self._tell_quiet(heard), since, more))

    def _tell_quiet(self, heard: np.ndarray) -> bool:
        """Whether a segment is very quiet. The user is told once."""
        quiet = (loudest := loudest_db(heard)) < QUIET_DB
        if quiet and not self._quiet:
            self._quiet = True
            self._note(f"the sound is very quiet, {loudest:.0f} dB of full scale at its loudest: speak closer")
        return quiet


def _refuse_what_means_nothing(
    own: dict[str, bool], *, chat: bool, system: str | None, speaker: Speaking | None, by_text: bool
) -> None:
    """own: arguments that a chat of the caller's takes the place of, and whether they are given."""
    ask = own["ask"]
    require("ask", ask, isinstance(ask, bool), "True or False")
    require("by_text", by_text, isinstance(by_text, bool), "True or False")
    if ask and own["language or translate_to"]:
        raise UsageError("language and translate_to mean nothing beside ask: say it in system, or leave them out")
    if chat and any(own.values()):
        raise UsageError("ask, language, translate_to and num_beams mean nothing beside chat: leave them out")
    if system is not None and not ask:
        raise UsageError("system means nothing without ask: leave it out")
    for name, given in (("speaker", speaker is not None), ("by_text", by_text)):
        if given and not (ask or chat):
            raise UsageError(f"{name} means nothing without ask or chat: leave it out")


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
    by_text: bool = False,
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
    file = _is_file(blocks)  # it waits while an answer is written, and does not hear it
    listener = Listener(
        engine, task, ask=ask, system=system, chat=chat, num_beams=num_beams, note=notes.append,
        live=blocks is None or (speaker is not None and not file), speaker=speaker,
        gates=live_gates(speaker, full_duplex=full_duplex or file, wake_word=wake_word), by_text=by_text,
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
