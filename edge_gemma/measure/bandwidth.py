"""Measures how fast this machine reads its memory. A model's speed is compared with this bound.

What is timed is a plain sum over the mapped pages of the weights, with the model's number of threads. Each thread reads
from four places at a time, with software prefetch 1 kB ahead. (From one place, some machines give a quarter less.
Without prefetch, one core of some others reaches a fifth.) The best of several passes counts. A model that is smaller
than the CPU's caches is read from the caches.

Owns: `ReadBandwidth`. Does not know: models.
"""

import time
from pathlib import Path

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from edge_gemma import kernels
from edge_gemma.errors import UsageError
from edge_gemma.kernels import isa
from edge_gemma.kernels.compiler import array, compiled, launch

_PASS_BYTES = 256_000_000  # the fewest bytes of one timed pass
_PASSES = 4
_LINE = 8  # 64-bit words in a cache line
_STREAMS = 4  # places a thread reads from
_AHEAD = 16 * _LINE  # 1 kB


class ReadBandwidth:
    """Measures the speed at which a number of threads read a file's pages in memory."""

    def __init__(self, file: Path, threads: int) -> None:
        words = file.stat().st_size // 8
        self._words = np.asarray(np.memmap(file, np.uint64, "r", shape=(words,)))
        self._parts = threads
        if words < _LINE * _STREAMS * self._parts:
            raise UsageError(f"{file} is too small to measure a bandwidth with it")
        self._sum()  # compiles, and maps every page

    def measure(self) -> float:
        """Returns the best of several passes, in GB/s (10^9 bytes)."""
        rounds = -(-_PASS_BYTES // self._words.nbytes)
        best = 0.0
        for _ in range(_PASSES):
            start = time.perf_counter()
            for _ in range(rounds):
                self._sum()
            best = max(best, rounds * self._read / (time.perf_counter() - start) / 1e9)
        return best

    def _sum(self) -> None:
        with kernels.use_threads(self._parts):
            launch(_sum, self._words, self._parts, np.empty(1, np.uint64))

    @property
    def _read(self) -> int:
        whole = _LINE * _STREAMS * self._parts
        return len(self._words) // whole * whole * 8


@intrinsic
def _prefetch(typing_context, array, index):  # type: ignore[no-untyped-def]
    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        isa.prefetch(builder, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@compiled(array("u8", 1), types.int64, array("u8", 1, True), parallel=True)
def _sum(words, parts, out):  # type: ignore[no-untyped-def]
    """out[0] = the sum of words, uint64 [n]. Each of `parts` threads reads a part, in _STREAMS runs at a time."""
    run = len(words) // (parts * _STREAMS * _LINE) * _LINE
    total = np.uint64(0)
    for part in numba.prange(parts):
        partial = np.uint64(0)
        for line in range(part * _STREAMS * run, (part * _STREAMS + 1) * run, _LINE):
            for stream in range(_STREAMS):
                first = line + stream * run
                _prefetch(words, first + _AHEAD)  # type: ignore[call-arg]  # ignored beyond the end
                for word in range(_LINE):
                    partial += words[first + word]
        total += partial
    out[0] = total
    return True
