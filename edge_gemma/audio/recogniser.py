"""One session that hears and writes: the instruction once, then segment after segment.

Owns: the order of things in the session (instruction, soft tokens, closing marks, reply), rewinding to the
instruction, the guard against endless repetition. Does not know: samples, files, microphones.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_gemma.audio.prompts import AudioPrompt
from edge_gemma.audio.seams import loop
from edge_gemma.chat import ChatEngine
from edge_gemma.errors import UsageError
from edge_gemma.generation.generate import FinishReason, Generation, stop_ids_of
from edge_gemma.generation.sampler import Sampler, Sampling
from edge_gemma.session import Timeline

SEGMENT_TOKENS = 750  # soft tokens of 30 s
STEP_MS = 640  # sound encoded at a time while listening; a shorter step reads all weights as well
STEP_TOKENS = STEP_MS // 40
_BATCH = STEP_TOKENS  # soft tokens prefilled at a time
_LEAST_REPLY = 64  # tokens


class Stream(Protocol):
    """What of `edge_gemma.audio.encoder.AudioStream` is used here."""

    def feed(self, samples: np.ndarray) -> np.ndarray: ...
    def finish(self) -> np.ndarray: ...


class Encoder(Protocol):
    """What of `edge_gemma.audio.encoder.AudioEncoder` is used here."""

    def encode(self, samples: np.ndarray) -> np.ndarray: ...
    def stream(self, step_ms: int) -> Stream: ...


class SpeechEngine(ChatEngine, Protocol):
    """What of `edge_gemma.engine.Engine` is used here."""

    @property
    def context(self) -> int: ...
    @property
    def audio(self) -> Encoder: ...
    def session(self, context: int | None = None) -> Timeline: ...


@dataclass(frozen=True)
class Written:
    """What was written. looped: it repeated itself; the repetitions are left out of `text`."""

    text: str
    looped: bool
    finish_reason: FinishReason
    first_token_s: float  # from the end of the sound
    tokens: int


def verbatim(config: Mapping[str, Any], num_beams: int | None = None) -> Sampling:
    """How speech is written down: the likeliest text, repetitions and all. num_beams: None for the checkpoint's own."""
    return Sampling.from_generation_config(config, temperature=0.0, repetition_penalty=1.0, num_beams=num_beams)


class Hearing:
    """Soft tokens as they come, prefilled a few at a time."""

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
            self._prefilled(tokens)
            self.session.prefill_soft(tokens, logits=False)

    def _prefilled(self, tokens: np.ndarray) -> None:
        """`tokens` go into the session next."""


class Scribe(Hearing):
    """Hears one segment after another and writes a reply to each. `begin`, `hear` any number of times, `write`."""

    def __init__(
        self,
        engine: SpeechEngine,
        prompt: AudioPrompt,
        *,
        sampling: Sampling | None = None,
        context: int | None = None,
    ) -> None:
        """sampling: `verbatim` by default; context: tokens, None for what a segment of 30 s with a reply as long needs.

        Raises UsageError if the engine's context is too small for that.
        """
        fixed = len(prompt.before) + SEGMENT_TOKENS + len(prompt.after)
        context = context or min(engine.context, fixed + 2 * SEGMENT_TOKENS + _LEAST_REPLY)
        if context < fixed + _LEAST_REPLY:
            raise UsageError(
                f"the context is {context} tokens, expected at least {fixed + _LEAST_REPLY} for 30 s of speech"
            )
        self._prompt, self._tokenizer = prompt, engine.tokenizer
        self._sampling = sampling or verbatim(engine.generation_config)
        self._stop_ids = stop_ids_of(engine.generation_config, engine.tokenizer)
        self.session = engine.session(context)
        self.session.prefill(list(prompt.before))
        self.session.mark()
        self._pending: list[np.ndarray] = []
        self.heard = 0  # soft tokens of this segment
        self.last: Written | None = None

    def begin(self) -> None:
        """A new segment: back to the instruction."""
        self.session.rewind(len(self._prompt.before))
        self._pending, self.heard, self.last = [], 0, None

    def room_for_clip(self, reply: int) -> bool:
        """True if this turn may have one more clip: the context holds it, what is left of this one, and the reply."""
        needed = 2 * STEP_TOKENS + SEGMENT_TOKENS + len(self._prompt.after) + 2 + reply
        return self.session.position + needed <= self.session.context

    def next_clip(self) -> None:
        """What is heard next is another clip of the same turn: one has 30 s at most."""
        self._prefill()
        self.session.prefill([self._prompt.after[0], self._prompt.before[-1]])

    def write(self, max_tokens: int | None = None, *, since: float | None = None) -> Iterator[str]:
        """The sound is over: the reply's text in pieces. `last` is the whole afterwards.

        since: when the sound ended, by time.perf_counter; None: now.
        """
        start = time.perf_counter() if since is None else since
        self._prefill()
        generation = Generation(
            self.session,
            [*self.session.ids, *self._prompt.after],
            tokenizer=self._tokenizer,
            sampler=Sampler(self._sampling),
            max_tokens=max_tokens,
            stop_ids=self._stop_ids,
        )
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
            text = self._text(result.tokens[: len(result.tokens) - repeated]) if repeated else result.text
            first = waited + result.timings.ttft_s
            reason: FinishReason = "length" if repeated else result.finish_reason
            self.last = Written(text, bool(repeated), reason, first, len(result.tokens))

    def _text(self, tokens: list[int]) -> str:
        detokenizer = self._tokenizer.detokenizer()
        return "".join([detokenizer.push(token) for token in tokens]) + detokenizer.flush()
