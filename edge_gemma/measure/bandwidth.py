"""Measures how fast this machine reads its memory. A model's speed is compared with this bound.

What is timed is a plain sum over the mapped pages of the weights, with the model's number of threads. Each thread reads
from four places at a time, with software prefetch 1 kB ahead. (From one place, some machines give a quarter less.
Without prefetch, one core of some others reaches a fifth.) The best of several passes counts. A model that is smaller
than the CPU's caches is read from the caches.

Owns: `ReadBandwidth`. Does not know: models, the loop (kernels/compiled/bandwidth.py).
"""

import time
from pathlib import Path

import numpy as np

from edge_gemma import kernels
from edge_gemma.errors import UsageError
from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording import program
from edge_gemma.kernels.recording.operation import Operation

_PASS_BYTES = 256_000_000  # the fewest bytes of one timed pass
_PASSES = 4
_LINE = 8  # 64-bit words in a cache line
_STREAMS = 4  # places a thread reads from


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


_sum_chunk = chunk_function("kernels.compiled.bandwidth", "sum_of", _STREAMS, _LINE)


def sum_of(words: np.ndarray, parts: int) -> int:
    """The sum of words, uint64 [n], modulo 2^64, but for the last that do not fill `parts` parts evenly."""
    sums = np.empty(parts, np.uint64)
    program.call([Operation(_sum_chunk, (words, sums, len(words), parts), (words,), (sums,), parts)])
    return int(sums.sum())
