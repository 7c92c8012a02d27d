"""Decoding a token, or a few together: the forward pass recorded once, then repeated as one launch.

Owns: the arrays a recorded pass reads and writes, and for how many tokens there are passes. Does not know: what the
pass does (decoder.py), whose tokens they are.
"""

from collections.abc import Sequence

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


class Pass:
    """The forward pass of a fixed number of tokens. The first goes through the decoder and is written down."""

    def __init__(self, decoder: Decoder, caches: Sequence[KVCache], logits: bool = False) -> None:
        """caches: each token's. logits: whether the head is part of the pass."""
        self._decoder = decoder
        self._caches = self._recorded = TokenCaches(caches)
        self._logits = logits
        self._state = RunState(decoder.config, len(caches))
        self._program: Program | None = None
        self._inputs: Inputs  # what the program reads
        self._out: np.ndarray  # what it writes

    def __call__(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Run a token of each cache; ids and positions: int64 [tokens].

        Returns the rows that enter the head, float32 [tokens, D], or the logits; the next call overwrites them.
        Nothing is stored for a token at position NOBODY, and its row has no meaning.
        """
        inputs = self._decoder.inputs(ids, positions)
        if self._program is not None:
            _refill(self._inputs, inputs)
            self._program.run()
        else:
            with record() as recorder:
                self._out = self._forward(inputs)
            self._program, self._inputs = recorder.program(), inputs
        return self._out

    def move(self, caches: Sequence[KVCache]) -> None:
        """Let the tokens have other caches, of the same model and dtype, none with more places than the first had."""
        self._caches = TokenCaches(caches)
        if self._program is None:
            return
        for i, old in self._recorded.layers.items():
            for t, (recorded, cache) in enumerate(zip(old.caches, self._caches.layers[i].caches, strict=True)):
                self._program.move(self._inputs.positions[t : t + 1], recorded.k, cache.k, cache.v)

    def _forward(self, inputs: Inputs) -> np.ndarray:
        rows = self._decoder.run(inputs, self._caches, self._state, keep=len(inputs.h))
        return self._decoder.logits(rows) if self._logits else rows


class Steps:
    """A token after another on one cache, or a few at once."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._passes: dict[int, Pass] = {}

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


def _refill(old: Inputs, new: Inputs) -> None:
    """Put tokens' inputs where a recorded pass looks for them."""
    old.positions[...], old.h[...] = new.positions, new.h
    if old.per_layer is not None and new.per_layer is not None:
        old.per_layer[...] = new.per_layer
    for kind, arrays in old.rope.items():
        for array, values in zip(arrays, new.rope[kind], strict=True):
            array[...] = values
