"""Decoding one token: the forward pass recorded once, then repeated as one launch.

Owns: the arrays a recorded pass reads and writes. Does not know: what the pass does (decoder.py).
"""

import numpy as np

from edge_gemma.kernels.recording.operation import NotRecordableError
from edge_gemma.kernels.recording.program import Program, record
from edge_gemma.model.decoder import Decoder, Inputs
from edge_gemma.model.kv_cache import KVCache
from edge_gemma.model.run_state import RunState


class Step:
    """A token after another on one cache. The first goes through the decoder as always and is written down."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._state = RunState(decoder.config, 1)
        self._program: Program | None = None
        self._inputs: Inputs  # what the program reads
        self._logits: np.ndarray  # float32 [1, vocab_size]: what it writes
        self._recordable = True

    def __call__(self, token: int) -> np.ndarray:
        """Append a token to the cache. Returns the logits after it: float32 [vocab_size]."""
        cache = self._cache
        cache.reserve(1)
        inputs = self._decoder.inputs(np.array([token], np.int64), cache.position)
        if self._program is not None:
            _refill(self._inputs, inputs)
            self._program.run(cache.position)
        elif self._recordable:
            self._record(inputs)
        else:
            self._logits = self._forward(inputs)
        cache.advance(1)
        return self._logits[0].copy()

    def _forward(self, inputs: Inputs) -> np.ndarray:
        return self._decoder.logits(self._decoder.run(inputs, self._cache, self._state, keep=1))

    def _record(self, inputs: Inputs) -> None:
        kept = Inputs(inputs.h.copy(), inputs.per_layer, inputs.rope)
        try:
            with record() as recorder:
                self._logits = self._forward(inputs)
            self._program, self._inputs = recorder.program(), inputs
        except NotRecordableError:
            self._recordable = False
            self._logits = self._forward(kept)


def _refill(old: Inputs, new: Inputs) -> None:
    """Put a token's inputs where a recorded pass looks for them."""
    old.h[...] = new.h
    if old.per_layer is not None and new.per_layer is not None:
        old.per_layer[...] = new.per_layer
    for kind, arrays in old.rope.items():
        for array, values in zip(arrays, new.rope[kind], strict=True):
            array[...] = values
