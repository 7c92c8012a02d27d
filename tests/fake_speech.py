"""A language of loudness that fakes can hear: each word is 0.2 s at its own level, a pause is zeros.

Owns: `say` (words to samples), an encoder whose soft tokens are the levels of their 40 ms, a session that writes down
the words of the soft tokens it was given. A word of which less than half was heard comes out garbled.
"""

import itertools
from collections.abc import Callable

import numpy as np

from edge_gemma.audio.features import SAMPLE_RATE, SAMPLES_PER_TOKEN, token_count
from edge_gemma.audio.vad import WINDOW
from edge_gemma.engine import Engine
from tests.fakes import TEMPLATE, FakeEngine, FakeSession, FakeTokenizer, reply

WORD_TOKENS = 5  # soft tokens of a word
WORD = WORD_TOKENS * SAMPLES_PER_TOKEN  # samples: 0.2 s
VOCABULARY = 400  # words: w0 to w399
PLACEHOLDER = FakeTokenizer().special_tokens["<|audio|>"]
_LOWEST, _STEP = 0.1, 0.8 / VOCABULARY


def level(word: int) -> float:
    return _LOWEST + _STEP * (word % VOCABULARY)


def say(*words: int) -> np.ndarray:
    """Samples: float32 [n]. A negative number is a pause of that many tenths of a second."""
    parts = [np.full(WORD, level(w)) if w >= 0 else np.zeros(-w * 1600) for w in words]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def text_of(words) -> str:
    return " ".join(f"w{w % VOCABULARY}" for w in words if w >= 0)


def understand(levels: np.ndarray) -> str:
    """What a session writes that heard tokens of these levels."""
    words = np.where(levels > _LOWEST / 2, np.rint((levels - _LOWEST) / _STEP), -1).astype(int)
    edges = np.flatnonzero(np.diff(words, prepend=-2, append=-2))
    found = []
    for start, end in itertools.pairwise(edges):
        if words[start] >= 0:
            times, rest = divmod(int(end - start), WORD_TOKENS)
            found += [f"w{words[start]}"] * max(times, int(rest > WORD_TOKENS // 2))
            found += [f"~{words[start]}~"] * (rest > 0 and not times and rest <= WORD_TOKENS // 2)
    return " ".join(found)


class LevelDetector:
    def probability(self, window: np.ndarray) -> float:
        assert window.shape == (WINDOW,)
        return float(np.abs(window).max() > _LOWEST / 2)


class FakeEncoder:
    """Soft tokens [n, 2]: the level of most of their 40 ms, and a one."""

    def __init__(self) -> None:
        self.clips: list[int] = []
        self.streamed: list[np.ndarray] = []

    def encode(self, samples: np.ndarray) -> np.ndarray:
        assert samples.dtype == np.float32
        assert len(samples) <= 480_000
        self.clips.append(len(samples))
        n = token_count(len(samples))
        padded = np.pad(samples, (0, max(0, n * SAMPLES_PER_TOKEN - len(samples))))[: n * SAMPLES_PER_TOKEN]
        levels = np.sort(padded.reshape(n, SAMPLES_PER_TOKEN), axis=1)[:, SAMPLES_PER_TOKEN // 2]
        return np.stack([levels, np.ones(n)], axis=1).astype(np.float32)

    def stream(self, step_ms: int) -> "FakeStream":
        return FakeStream(self, step_ms * SAMPLE_RATE // 1000 // SAMPLES_PER_TOKEN)


class FakeStream:
    """Gives tokens a whole step at a time, as the encoder does."""

    def __init__(self, encoder: FakeEncoder, step: int) -> None:
        self._encoder, self._samples, self._done, self._step = encoder, np.zeros(0, np.float32), 0, step

    def feed(self, samples: np.ndarray) -> np.ndarray:
        self._encoder.streamed.append(samples.copy())
        self._samples = np.concatenate([self._samples, samples])
        final = max(0, (len(self._samples) - 1) // SAMPLES_PER_TOKEN)
        return self._tokens(final // self._step * self._step)

    def finish(self) -> np.ndarray:
        return self._tokens(token_count(len(self._samples)))

    def _tokens(self, final: int) -> np.ndarray:
        tokens = self._encoder.encode(self._samples)[self._done : final]
        self._done = max(final, self._done)
        return tokens


class HearingSession(FakeSession):
    """Replies with what `write` makes of the levels heard since the last rewind, and of how often it was asked."""

    def __init__(self, write: Callable[[np.ndarray], str], context: int = 4096) -> None:
        super().__init__([reply("")], context)
        self._write = write
        self.soft: dict[int, float] = {}
        self.prompts: list[list[int]] = []

    def prefill_soft(
        self, embeddings: np.ndarray, *, placeholder: int | None = None, logits: bool = True
    ) -> np.ndarray | None:
        assert embeddings.shape[1:] == (2,)
        start = self.position
        self._take("soft", [PLACEHOLDER] * len(embeddings))
        self.soft |= {start + i: float(row[0]) for i, row in enumerate(embeddings)}
        return self._logits() if logits else None

    def prefill(self, ids: list[int]) -> np.ndarray:
        self._take("prefill", ids)
        levels = np.array([v for at, v in sorted(self.soft.items()) if at < self.position])
        self.prompts.append(list(self.ids))
        self._turn, self._next, self._replies = 0, 0, [reply(self._write(levels))]
        return self._logits()

    def rewind(self, position: int) -> None:
        super().rewind(position)
        self.soft = {at: v for at, v in self.soft.items() if at < position}


class SpeechEngine(FakeEngine):
    hear = Engine.hear

    def __init__(
        self,
        write: Callable[[np.ndarray], str] = understand,
        *,
        context: int = 4096,
        chat_template: str | None = TEMPLATE,
    ) -> None:
        super().__init__(chat_template=chat_template)
        self.context = context
        self.audio = FakeEncoder()
        self.timeline = HearingSession(write, context)
