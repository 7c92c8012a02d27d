"""Decoding a token, or a few together: the forward pass recorded once, then repeated as one launch.

Owns: recording a pass and repeating it, the arrays that it reads and writes, and for how many tokens there are passes.
Does not know: what the pass does (decoder.py, drafter.py), whose tokens they are.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np

from edge_gemma.kernels.recording.program import Program, record
from edge_gemma.model.decoder import Decoder, Inputs
from edge_gemma.model.kv_cache import KVCache, TokenCaches
from edge_gemma.model.run_state import RunState

MOST = 16  # tokens of a recorded pass
NOBODY = -1  # the position of a row that has no token
PAD = 0  # the token of such a row


def padded(tokens: int) -> int:
    """The rows of the recorded pass that so many tokens go through: the next power of two."""
    return 1 << (tokens - 1).bit_length()


class Recorded:
    """A pass that happens in kernels altogether, over arrays that stay where they are: recorded once, then repeated."""

    def __init__(self) -> None:
        self.program: Program | None = None

    def run(self, forward: Callable[[], None]) -> None:
        """Run the pass. forward: the pass, the same each time."""
        if self.program is not None:
            self.program.run()
            return
        with record() as recorder:
            forward()
        self.program = recorder.program()


class Pass:
    """The forward pass of a fixed number of tokens, for whichever caches: recorded on a cache of nobody."""

    def __init__(self, decoder: Decoder, nobody: KVCache, tokens: int, logits: bool) -> None:
        """nobody: a cache with as many places as any that the pass will be for. logits: whether the head is in it."""
        self._decoder = decoder
        self._caches = TokenCaches([nobody] * tokens)
        self._on: list[weakref.ref[KVCache]] = []  # whose tokens the latest were
        self._logits = logits
        self._state = RunState(decoder.config, tokens)
        self.recorded = Recorded()
        self._inputs: Inputs | None = None  # what it reads
        self._out: np.ndarray  # what it writes
        self.rows: np.ndarray  # the rows that enter the head, float32 [tokens, D]; the next call overwrites them
        self(np.full(tokens, PAD), np.full(tokens, NOBODY))

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Run a token of each cache; ids and positions: int64 [tokens].

        Returns the rows that enter the head, float32 [tokens, D], or the logits; the next call overwrites them.
        Nothing is stored for a token at position NOBODY, and its row has no meaning.
        """
        inputs = self._decoder.inputs(ids, positions)
        self._fill(inputs)
        self.recorded.run(self._forward)
        return self._out

    def move(self, caches: Sequence[KVCache]) -> None:
        """Let the tokens be of these caches, of the same model and dtype, none with more places than nobody's."""
        assert self.recorded.program is not None
        assert self._inputs is not None
        if [on() for on in self._on] == list(caches):
            return
        self._on = []
        for i, recorded in self._caches.layers.items():
            for t, (nobody, cache) in enumerate(zip(recorded.caches, caches, strict=True)):
                new = cache.layers[i]
                self.recorded.program.move(self._inputs.positions[t : t + 1], nobody.k, new.k, new.v)
        self._on = list(map(weakref.ref, caches))

    def _fill(self, new: Inputs) -> None:
        """Put tokens' inputs where the pass looks for them. The pass changes what it reads, and `new` stays."""
        if (old := self._inputs) is None:
            self._inputs = copy.deepcopy(new)
            return
        old.positions[...], old.h[...] = new.positions, new.h
        if old.per_layer is not None and new.per_layer is not None:
            old.per_layer[...] = new.per_layer
        for kind, arrays in old.rope.items():
            for array, values in zip(arrays, new.rope[kind], strict=True):
                array[...] = values

    def _forward(self) -> None:
        assert self._inputs is not None
        self.rows = self._decoder.run(self._inputs, self._caches, self._state, keep=len(self._inputs.h))
        self._out = self._decoder.logits(self.rows) if self._logits else self.rows


class Passes:
    """The recorded passes of a model, for all its sessions: one at a time, recorded when it is first asked for."""

    def __init__(self, decoder: Decoder, slack: int, kv_dtype: str) -> None:
        """slack, kv_dtype: of the sessions' caches."""
        self._decoder, self._slack, self._kv_dtype = decoder, slack, kv_dtype
        self._passes: dict[tuple[int, bool], Pass] = {}
        self._places = 0  # of the caches that they were made for
        self._one_at_a_time = threading.Lock()

    def run(
        self, caches: Sequence[KVCache], ids: Sequence[int], positions: Sequence[int], logits: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a token of each cache, MOST at most, at such positions. A cache may be there for several tokens.

        Returns the rows that enter the head, float32 [tokens, D], and the logits, float32 [tokens, vocab_size], or with
        logits False the rows again.
        """
        count = len(ids)
        empty = padded(count) - count
        with self._one_at_a_time:
            run = self._pass(count + empty, max(cache.places for cache in caches), logits)
            run.move([*caches, *[caches[0]] * empty])
            out = run(np.array([*ids, *[PAD] * empty], np.int64), np.array([*positions, *[NOBODY] * empty], np.int64))
            rows = run.rows[:count].copy()
            return rows, out[:count].copy() if logits else rows

    def _pass(self, tokens: int, places: int, logits: bool) -> Pass:
        """A pass of so many tokens. Pages of the cache that it is recorded on are never written."""
        if places > self._places:
            self._passes, self._places = {}, places
        if (tokens, logits) not in self._passes:
            nobody = KVCache(self._decoder.config, self._places, self._slack, self._kv_dtype)
            self._passes[tokens, logits] = Pass(self._decoder, nobody, tokens, logits)
        return self._passes[tokens, logits]


class Steps:
    """A token after another on one cache, or a few at once."""

    def __init__(self, passes: Passes, cache: KVCache) -> None:
        self._passes, self._cache = passes, cache
        self.row: np.ndarray | None = None
        """The row that entered the head of `one`, the latest time: float32 [D]. None: no token was run."""

    def one(self, token: int) -> np.ndarray:
        """Append a token to the cache. Returns the logits after it: float32 [vocab_size]."""
        rows, logits = self._run([token], logits=True)
        self.row = rows[0]
        return logits[0]

    def several(self, ids: Sequence[int]) -> np.ndarray:
        """Append 2 to MOST tokens. Returns the rows that enter the head: float32 [n, D]."""
        return self._run(ids, logits=False)[0]

    def _run(self, ids: Sequence[int], logits: bool) -> tuple[np.ndarray, np.ndarray]:
        first, count = self._cache.position, len(ids)
        self._cache.reserve(count)
        out = self._passes.run([self._cache] * count, ids, range(first, first + count), logits)
        self._cache.advance(count)
        return out
