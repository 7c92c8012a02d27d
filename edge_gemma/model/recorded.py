"""The forward pass of a token, a few, or a chunk of a prompt: recorded once, then repeated without Python in between.

Owns: recording a pass and repeating it, the arrays that it reads and writes, and for how many tokens there are passes.
Does not know: what the pass does (decoder.py, drafter.py), whose tokens they are.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from edge_gemma.kernels.recording import program
from edge_gemma.model.decoder import Decoder, Inputs
from edge_gemma.model.kv_cache import KVCache, LayerCache, TokenCaches
from edge_gemma.model.run_state import RunState

MOST = 16  # tokens of a recorded pass
NOBODY = -1  # the position of a row that has no token
PAD = 0  # the token of such a row


def padded(tokens: int) -> int:
    """The rows of the recorded pass that so many tokens go through: the next power of two."""
    return 1 << (tokens - 1).bit_length()


class Recorded:
    """A pass that happens in kernels altogether, over arrays that stay where they are: written down, then repeated."""

    def __init__(self, forward: Callable[[], None]) -> None:
        """forward: the pass. It is not done yet."""
        with program.record() as recorder:
            forward()
        self.programs = recorder.programs()

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Run the pass. between: called where it was cut."""
        for part in self.programs:
            between()
            part.run()


class Pass:
    """The forward pass of a fixed number of tokens, for whichever caches: recorded on those of nobody."""

    def __init__(
        self,
        decoder: Decoder,
        nobody: TokenCaches | KVCache,
        state: RunState,
        keep: int,
        logits: bool = False,
        inputs: Inputs | None = None,
    ) -> None:
        """nobody: caches with as many places as any that the pass will be for. keep: as in `Decoder.run`.

        logits: whether the head is part of the pass. inputs: what it reads, where that is another pass's.
        """
        self._decoder, self._nobody, self._state = decoder, nobody, state
        self._keep, self._logits = keep, logits
        self._on: list[weakref.ref[KVCache]] = []  # whose tokens the latest were
        self.inputs = inputs or decoder.inputs(np.full(state.rows, PAD), np.full(state.rows, NOBODY))
        """What it reads."""
        self.out: np.ndarray
        """What it writes: the rows that enter the head, float32 [keep, D], or the logits."""
        self.rows: np.ndarray
        """The rows that enter the head, float32 [keep, D]."""
        self.recorded = Recorded(self._forward)

    def __call__(self, caches: Sequence[KVCache], new: Inputs, between: Callable[[], None] = lambda: None) -> None:
        """Run tokens of caches of the same model and dtype, none with more places than nobody's.

        Nothing is stored for a token at position NOBODY, and its row has no meaning.
        """
        self._move(caches)
        old = self.inputs
        old.positions[...], old.h[...] = new.positions, new.h
        if old.per_layer is not None and new.per_layer is not None:
            old.per_layer[...] = new.per_layer
        for kind, arrays in old.rope.items():
            for array, values in zip(arrays, new.rope[kind], strict=True):
                array[...] = values
        self.recorded.run(between)

    def _move(self, caches: Sequence[KVCache]) -> None:
        if [on() for on in self._on] == list(caches):
            return
        self._on = []
        for cache, (nobody, tokens) in zip(caches, self._seats(), strict=True):
            for t, (i, recorded) in itertools.product(tokens, nobody.items()):
                new = cache.layers[i]
                self.recorded.programs[0].move(self.inputs.positions[t : t + 1], recorded.k, new.k, new.v)
        self._on = list(map(weakref.ref, caches))

    def _forward(self) -> None:
        self.rows = self._decoder.run(self.inputs, self._nobody, self._state, self._keep)
        self.out = self._decoder.logits(self.rows) if self._logits else self.rows

    def _seats(self) -> Iterator[tuple[dict[int, LayerCache], set[int]]]:
        """For each cache that is moved to, the recorded one's layers, and the tokens whose positions they go by."""
        count = self._state.rows
        if isinstance(self._nobody, KVCache):
            yield self._nobody.layers, {0, count - self._keep}  # runs of tokens go by their first
            return
        for t in range(count):
            yield {i: layer.caches[t] for i, layer in self._nobody.layers.items()}, {t}


class Passes:
    """The recorded passes of a model, for all its sessions, each recorded when it is first asked for."""

    def __init__(self, decoder: Decoder, slack: int, kv_dtype: str) -> None:
        """slack, kv_dtype: of the sessions' caches."""
        self._decoder, self._slack, self._kv_dtype = decoder, slack, kv_dtype
        self._whole = decoder.weights.in_kernels(slack)  # whether a chunk can be recorded
        self._few: dict[tuple[int, int, bool], Pass] = {}  # by tokens, those of them that are kept, logits
        self._chunks: dict[int, Pass] = {}  # all in the same memory
        self._state: RunState | None = None
        self._places = 0  # of the caches that they were made for
        self._nobody: KVCache  # of which no page is ever written
        self._one_at_a_time, self._chunking = threading.Lock(), threading.Lock()

    def run(
        self, caches: Sequence[KVCache], ids: Sequence[int], positions: Sequence[int], keep: int, logits: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a token of each cache, MOST at most, at such positions. A cache may be there for several tokens.

        keep: all tokens, or the last one. Returns their rows that enter the head, float32 [keep, D], and the logits,
        float32 [keep, vocab_size], or with logits False the rows again.
        """
        empty = padded(len(ids)) - len(ids)  # rows before the tokens
        tokens = np.array([*[PAD] * empty, *ids], np.int64)
        inputs = self._decoder.inputs(tokens, np.array([*[NOBODY] * empty, *positions], np.int64))
        with self._one_at_a_time:
            self._make_room(caches)
            kept = len(tokens) if keep == len(ids) else keep
            key = len(tokens), kept, logits
            if key not in self._few:
                nobody = TokenCaches([self._nobody] * len(tokens))
                state = RunState(self._decoder.config, len(tokens))
                self._few[key] = Pass(self._decoder, nobody, state, kept, logits)
            run = self._few[key]
            run([*[caches[0]] * empty, *caches], inputs)
            rows = run.rows[kept - keep :].copy()
            return rows, run.out[kept - keep :].copy() if logits else rows

    def chunk(self, cache: KVCache, inputs: Inputs, keep: int, between: Callable[[], None]) -> np.ndarray:
        """Run a chunk of a prompt at a cache's end, `slack` tokens at most, as `Decoder.run` does.

        between: called between two layers; others may use these passes then.
        """
        count, run = len(inputs.h), self._decoder.run
        if not self._chunking.acquire(blocking=False):  # another thread is at its chunk
            return run(inputs, cache, RunState(self._decoder.config, count, between), keep)
        try:
            with self._one_at_a_time:
                self._make_room([cache])
                if self._state is None:
                    self._state = RunState(self._decoder.config, self._slack, between=program.cut)
                if recorded := count == self._slack and keep < 2 and self._whole:
                    chunk = self._recorded_chunk(keep)
            if not recorded:
                return run(inputs, cache, self._state.shared(between), keep)
            chunk([cache], inputs, between)
            return chunk.rows.copy()
        finally:
            self._chunking.release()

    def _recorded_chunk(self, keep: int) -> Pass:
        if keep not in self._chunks:
            assert self._state is not None
            read = next((other.inputs for other in self._chunks.values()), None)
            self._chunks[keep] = Pass(self._decoder, self._nobody, self._state, keep, inputs=read)
        return self._chunks[keep]

    def _make_room(self, caches: Sequence[KVCache]) -> None:
        """Passes are for caches of so many places at most."""
        places = max(cache.places for cache in caches)
        if places > self._places:
            self._few, self._chunks, self._places = {}, {}, places
            self._nobody = KVCache(self._decoder.config, places, self._slack, self._kv_dtype)


class Steps:
    """The way of one cache through its model: a token after another, a few at once, or chunks of a prompt."""

    def __init__(self, decoder: Decoder, passes: Passes, cache: KVCache) -> None:
        self._decoder, self._passes, self._cache = decoder, passes, cache
        self.row: np.ndarray | None = None
        """The row that entered the head of `one`, the latest time: float32 [D]. None: no token was run."""

    def one(self, token: int) -> np.ndarray:
        """Append a token to the cache. Returns the logits after it: float32 [vocab_size]."""
        rows, logits = self._run([token], 1, logits=True)
        self.row = rows[0]
        return logits[0]

    def several(self, ids: Sequence[int], keep: int) -> np.ndarray:
        """Append 2 to MOST tokens. Returns the last `keep` rows that enter the head: float32 [keep, D]."""
        return self._run(ids, 1 if keep <= 1 else len(ids), logits=False)[0][-keep or len(ids) :]

    def chunk(
        self, ids: np.ndarray, keep: int, input_embeds: np.ndarray | None, between: Callable[[], None]
    ) -> np.ndarray:
        """Append a chunk of a prompt. Returns the last `keep` rows that enter the head: float32 [keep, D].

        Arguments as of `Decoder.forward`. between: called between two layers; what it raises ends the pass.
        """
        first, count = self._cache.position, len(ids)
        self._cache.reserve(count)
        inputs = self._decoder.inputs(ids, np.arange(first, first + count), input_embeds)
        rows = self._passes.chunk(self._cache, inputs, keep, between)
        self._cache.advance(count)
        return rows

    def _run(self, ids: Sequence[int], keep: int, logits: bool) -> tuple[np.ndarray, np.ndarray]:
        first, count = self._cache.position, len(ids)
        self._cache.reserve(count)
        out = self._passes.run([self._cache] * count, ids, range(first, first + count), keep, logits)
        self._cache.advance(count)
        return out
