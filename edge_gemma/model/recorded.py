"""Decoding a token, or a few together: the forward pass recorded once, then repeated as one launch.

Owns: recording a pass and repeating it, the arrays that it reads and writes, and for how many tokens there are passes.
Does not know: what the pass does (decoder.py, drafter.py), whose tokens they are.
"""

import copy
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
    """The forward pass of a fixed number of tokens. The first goes through the decoder and is written down."""

    def __init__(self, decoder: Decoder, caches: Sequence[KVCache], logits: bool = False) -> None:
        """caches: each token's. logits: whether the head is part of the pass."""
        self._decoder = decoder
        self._caches = self._recorded_on = TokenCaches(caches)
        self._logits = logits
        self._state = RunState(decoder.config, len(caches))
        self.recorded = Recorded()
        self._inputs: Inputs | None = None  # what it reads
        self._out: np.ndarray  # what it writes
        self.rows: np.ndarray  # the rows that enter the head, float32 [tokens, D]; the next call overwrites them

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
        """Let the tokens have other caches, of the same model and dtype, none with more places than the first had."""
        self._caches = TokenCaches(caches)
        if self.recorded.program is None or self._inputs is None:
            return
        for i, old in self._recorded_on.layers.items():
            for t, (first, cache) in enumerate(zip(old.caches, self._caches.layers[i].caches, strict=True)):
                self.recorded.program.move(self._inputs.positions[t : t + 1], first.k, cache.k, cache.v)

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


class Steps:
    """A token after another on one cache, or a few at once."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._passes: dict[int, Pass] = {}

    @property
    def row(self) -> np.ndarray:
        """The row that entered the head of `one`, the latest time: float32 [D]."""
        return self._passes[1].rows[0].copy()

    @property
    def begun(self) -> bool:
        """Whether a token was run."""
        return bool(self._passes)

    def one(self, token: int) -> np.ndarray:
        """Append a token to the cache. Returns the logits after it: float32 [vocab_size]."""
        return self._run([token], 1)[0].copy()

    def several(self, ids: Sequence[int]) -> np.ndarray:
        """Append 2 to MOST tokens. Returns the rows that enter the head: float32 [n, D]."""
        return self._run(ids, padded(len(ids)))[: len(ids)].copy()

    def _run(self, ids: Sequence[int], rows: int) -> np.ndarray:
        if rows not in self._passes:
            self._passes[rows] = Pass(self._decoder, [self._cache] * rows, logits=rows == 1)
        positions = np.full(rows, NOBODY)
        positions[: len(ids)] = np.arange(self._cache.position, self._cache.position + len(ids))
        self._cache.reserve(len(ids))
        out = self._passes[rows](np.array([*ids, *[PAD] * (rows - len(ids))], np.int64), positions)
        self._cache.advance(len(ids))
        return out
