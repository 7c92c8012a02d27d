"""Speech written down: one session prefills the instruction once, then transcribes segment after segment.

Owns: the order in the session (instruction, soft tokens, closing marks, reply), rewinding to the instruction, what is
guessed of a text before its sound has ended, stopping a text that repeats itself. Does not know: samples, files,
microphones.

Spoken messages of a chat do not come this way (spoken.py): they are answered by the chat itself. Transcription is no
chat, because each segment has its own limit of tokens, a retry is no message, and its session is as small as 30 s of
speech need, whatever the engine's context is.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_gemma.audio.prompts import AudioPrompt
from edge_gemma.audio.seams import loop
from edge_gemma.conversation import ChatEngine
from edge_gemma.errors import UsageError
from edge_gemma.generation.generate import FinishReason, Generation, Result, StreamTokenizer, stop_ids_of
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.session import Timeline

SEGMENT_TOKENS = 750  # soft tokens of 30 s
STEP_MS = 640  # sound encoded at a time while listening; a shorter step reads all weights as well
STEP_TOKENS = STEP_MS // 40
_BATCH = STEP_TOKENS  # soft tokens prefilled at a time
_LEAST_REPLY = 64  # tokens
_LONGEST_GUESS = 96  # tokens: with the closing marks no more than a session forgets cheaply (session.CHUNK)
_WRITTEN_AGAIN = 4  # tokens at the end of a guess that the next one hears with more sound
_READING = 0.5  # share of a guess's time for what the one before wrote


class Stream(Protocol):
    """The part of `edge_gemma.audio.encoder.AudioStream` that is used here."""

    def feed(self, samples: np.ndarray) -> np.ndarray: ...
    def finish(self) -> np.ndarray: ...


class Encoder(Protocol):
    """The part of `edge_gemma.audio.encoder.AudioEncoder` that is used here."""

    def encode(self, samples: np.ndarray) -> np.ndarray: ...
    def stream(self, step_ms: int) -> Stream: ...


class SpeechEngine(ChatEngine, Protocol):
    """The part of `edge_gemma.engine.Engine` that is used here."""

    @property
    def context(self) -> int: ...
    @property
    def audio(self) -> Encoder: ...
    def session(self, context: int | None = None, *, shared: bool = False) -> Timeline: ...


@dataclass(frozen=True)
class Written:
    """A text written for a sound. looped: it repeated itself; the repetitions are left out of `text`."""

    text: str
    looped: bool
    finish_reason: FinishReason
    first_token_s: float  # from the end of the sound
    tokens: int


def verbatim(config: Mapping[str, Any], num_beams: int | None = None) -> Sampling:
    """The sampling of a transcription: the likeliest text, without a penalty for repetition. num_beams: None for the
    checkpoint's own number.
    """
    return Sampling.from_generation_config(config, temperature=0.0, repetition_penalty=1.0, num_beams=num_beams)


class Hearing:
    """Soft tokens are prefilled while they arrive, a few at a time."""

    session: Timeline
    heard: int  # soft tokens of what is being said
    _pending: list[np.ndarray]

    def hear(self, tokens: np.ndarray) -> None:
        """tokens: float32 [n, hidden_size], the next soft tokens. They are prefilled once there are a few."""
        if len(tokens):
            self._pending.append(tokens)
            self.heard += len(tokens)
        if sum(map(len, self._pending)) >= _BATCH:
            self._prefill()

    def _prefill(self) -> None:
        if self._pending:
            tokens, self._pending = np.concatenate(self._pending), []
            if self._take(tokens):
                self.session.prefill_soft(tokens, logits=False)

    def _take(self, tokens: np.ndarray) -> bool:
        """Called with the next tokens: float32 [n, hidden_size]. Returns whether they go into the session now."""
        return True


class Scribe(Hearing):
    """Writes down one segment after another. For each: `begin`, `hear` any number of times, `write`."""

    def __init__(self, engine: SpeechEngine, prompt: AudioPrompt, *, sampling: Sampling | None = None) -> None:
        """sampling: None for `verbatim`. Raises UsageError if the engine's context is too small for 30 s of speech."""
        fixed = len(prompt.before) + SEGMENT_TOKENS + len(prompt.after)
        check_context(engine.context, fixed)
        context = min(engine.context, fixed + 2 * SEGMENT_TOKENS + _LEAST_REPLY)
        self._prompt, self._tokenizer = prompt, engine.tokenizer
        self._sampling = sampling or verbatim(engine.generation_config)
        self._stop_ids = stop_ids_of(engine.generation_config, engine.tokenizer)
        self.session = engine.session(context)
        self.session.prefill(list(prompt.before))
        self.session.mark()
        self._pending: list[np.ndarray] = []
        self.heard = 0  # soft tokens of this segment
        self.last: Written | None = None
        self._drafts = engine.drafts()
        self._expected: list[int] = []  # tokens that the text probably has: those of a shorter part of the sound
        self._guessed = self.session.position  # where the latest guess began
        self._token_s = 0.0  # that a guess took to read a token

    def begin(self, *, again: bool = False) -> None:
        """A new segment: back to the instruction. again: it is a part of the segment before, or all of it."""
        self.session.rewind(len(self._prompt.before))
        self._pending, self.heard, self.last = [], 0, None
        self._guessed = self.session.position
        if not again:
            self._expected = []

    @property
    def guesses(self) -> bool:
        """Whether `guess` is of use: drafts are made, and something was heard that no guess has heard."""
        return self._drafts is not None and self._sampling.num_beams == 1 and self._guessed < self.session.position

    def guess(self, seconds: float) -> None:
        """Write what was heard so far, for so long at most, so that `write` finds most of its text guessed.

        The session is left as it was. Each guess reads what the one before wrote, which is quicker than to write it,
        and goes on from there: only its end is heard again. If something before was wrong, `write` hears it.
        """
        start, at = time.perf_counter(), self.session.position
        self._guessed = at
        known = self._known(seconds)
        generation = self._generation(_LONGEST_GUESS - len(known), known)
        try:
            for _ in generation:
                if time.perf_counter() - start >= seconds:
                    break
        finally:
            generation.close()
            written = known + generation.result.tokens
            self._expected = written + self._expected[len(written) :]
            self.session.rewind(at)
            timings = generation.result.timings
            self._token_s = timings.prefill_s / max(1, timings.prefill_tokens)

    def _known(self, seconds: float) -> list[int]:
        """The tokens that a guess of so many seconds reads."""
        known = self._expected[: _LONGEST_GUESS - _WRITTEN_AGAIN][:-_WRITTEN_AGAIN]
        return known if self._token_s == 0 else known[: int(_READING * seconds / self._token_s)]

    def _generation(self, max_tokens: int | None, known: Sequence[int] = ()) -> Generation:
        """known: the tokens that the text begins with."""
        return Generation(
            self.session,
            [*self.session.ids, *self._prompt.after, *known],
            tokenizer=self._tokenizer,
            sampler=Sampler(self._sampling),
            max_tokens=max_tokens,
            stop_ids=self._stop_ids,
            drafts=self._drafts,
            expected=self._expected[len(known) :],
        )

    def write(self, max_tokens: int | None = None, *, since: float | None = None) -> Iterator[str]:
        """End the segment. Yields the text in pieces; afterwards `last` is complete.

        since: when the sound ended, by time.perf_counter; None for now.
        """
        start = time.perf_counter() if since is None else since
        self._prefill()
        generation = self._generation(max_tokens)
        waited = time.perf_counter() - start
        result, repeated = generation.result, 0
        try:
            for piece in generation:
                if piece.kind == "answer":
                    yield piece.text
                if repeated := loop(result.tokens):
                    break
        finally:
            generation.close()
            text = without_loop(result, repeated, self._tokenizer)
            self._expected = result.tokens
            first = waited + result.timings.ttft_s
            reason: FinishReason = "length" if repeated else result.finish_reason
            self.last = Written(text, bool(repeated), reason, first, len(result.tokens))


def without_loop(result: Result, repeated: int, tokenizer: StreamTokenizer) -> str:
    """The text of a reply whose last `repeated` tokens only repeat what stands before them."""
    if not repeated:
        return result.text
    detokenizer = tokenizer.detokenizer()
    return "".join([detokenizer.push(token) for token in result.tokens[:-repeated]]) + detokenizer.flush()


def check_context(context: int, fixed: int) -> None:
    """fixed: tokens of the prompt with 30 s of speech. Raises UsageError if the context has no room for a reply."""
    if context < fixed + _LEAST_REPLY:
        raise UsageError(
            f"the context is {context} tokens, expected at least {fixed + _LEAST_REPLY} for 30 s of speech"
        )
