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
from edge_gemma.kernels.compiler import chunk_function
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import Operation, operands, pointer

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
            sum_of(self._words, self._parts)

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


@chunk_function("sum_of")
def _sum_chunk(row, chunk):  # type: ignore[no-untyped-def]
    """words, sums, n, parts: a part, in _STREAMS runs at a time."""
    w, _ = operands(row)
    words = numba.carray(pointer(w[0]), w[2], np.uint64)  # type: ignore[call-arg]
    sums = numba.carray(pointer(w[1]), w[3], np.uint64)
    run = w[2] // (w[3] * _STREAMS * _LINE) * _LINE
    total = np.uint64(0)
    for line in range(chunk * _STREAMS * run, (chunk * _STREAMS + 1) * run, _LINE):
        for stream in range(_STREAMS):
            first = line + stream * run
            _prefetch(words, first + _AHEAD)  # ignored beyond the end
            for word in range(_LINE):
                total += words[first + word]
    sums[chunk] = total


def sum_of(words: np.ndarray, parts: int) -> int:
    """The sum of words, uint64 [n], modulo 2^64, but for the last that do not fill `parts` parts evenly."""
    sums = np.empty(parts, np.uint64)
    program.call([Operation(_sum_chunk, (words, sums, len(words), parts), (words,), (sums,), parts)])
    return int(sums.sum())
