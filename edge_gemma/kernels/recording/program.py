"""A run of kernels on some tokens, written down once and repeated without returning to Python in between.

    with record() as recorder:       # what is called here is written down, and not done
        h = decoder.run(...)
    program = recorder.program()
    program.run()                    # the kernels, on the same arrays, whatever tokens and positions these hold

Owns: recording, which operations must wait for which, and single calls. Does not know: what is computed (the kernels
say), what the caller puts into the arrays between two runs, the threads' way through the list (workers.py).

A token's 800 kernels last from 1 to 500 us, and a call from Python costs about 7: a program is one call.
"""

import contextlib
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from edge_gemma.kernels import workers
from edge_gemma.kernels.functions import ChunkFunction
from edge_gemma.kernels.recording.operation import Operation
from edge_gemma.kernels.thread_count import threads


class Memory:
    """Arrays that operations use among themselves: what an operation left there has no meaning after its call."""

    def __init__(self) -> None:
        self._arrays: dict[object, np.ndarray] = {}

    def array(self, name: object, shape: tuple[int, ...], dtype: object = np.float32) -> np.ndarray:
        """An array for the next operations. Under its name there is one place, so that what writes there waits."""
        flat, size = self._arrays.get(name), math.prod(shape)
        if flat is None or len(flat) < size:
            flat = self._arrays[name] = np.empty(size, dtype)
        return flat[:size].reshape(shape)

    def of_token(self, name: str, position: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The same for the operations on one token, whose position this is: float32."""
        return self.array((name, shape[1:]), shape)

    def ring(self, position: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray) -> np.ndarray:
        """Where the cache of the token at `position` lies: int64 [3], addresses of keys and values, capacity."""
        return _place(k_cache, v_cache)


class Recorder(Memory):
    """Writes operations down, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._cuts = [0]
        self.rings: dict[tuple[int, int], np.ndarray] = {}

    def of_token(self, name: str, position: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The same, another array for each token: their operations do not wait for each other."""
        return self.array((name, shape[1:], position.ctypes.data), shape)

    def ring(self, position: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray) -> np.ndarray:
        """The same, for all operations on this cache."""
        key = position.ctypes.data, k_cache.ctypes.data
        return self.rings.setdefault(key, _place(k_cache, v_cache))

    def program(self) -> "Program":
        return Program(self.operations, self.rings)

    def cut(self) -> None:
        """What follows goes into another program."""
        self._cuts.append(len(self.operations))

    def programs(self) -> "list[Program]":
        """What was written down between two cuts each, in order."""
        parts = itertools.pairwise([*self._cuts, len(self.operations)])
        return [Program(self.operations[begin:end], self.rings) for begin, end in parts if begin < end]


class Program:
    """Operations laid out for the threads. It keeps the arrays they work on alive."""

    def __init__(self, operations: Sequence[Operation], rings: dict[tuple[int, int], np.ndarray] | None = None) -> None:
        self._operations, self._rings = operations, rings or {}
        self._list = workers.List(len(operations))
        for i, (operation, waits) in enumerate(zip(operations, _waits(operations), strict=True)):
            operation.lay_out(self._list.rows, i, waits)

    def __len__(self) -> int:
        return len(self._operations)

    def move(self, position: np.ndarray, recorded: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray) -> None:
        """Let the token at `position` use another cache than the one whose keys are `recorded`, from now on.

        It has the same dtype and heads, and no more places. The caller keeps it alive.
        """
        ring = self._rings.get((position.ctypes.data, recorded.ctypes.data))
        if ring is not None:  # else no operation of this token uses it
            ring[...] = _place(k_cache, v_cache)

    def run(self) -> None:
        """Repeat the operations."""
        workers.run(self._list, len(self), threads(), self)


@contextlib.contextmanager
def record() -> Iterator[Recorder]:
    """Write down the kernels this thread calls, instead of doing them."""
    _mine.recorder = Recorder()
    try:
        yield _mine.recorder
    finally:
        _mine.recorder = None


@contextlib.contextmanager
def collect() -> Iterator[set[ChunkFunction]]:
    """Note what the kernels are made of that this thread calls. Nothing is computed: what they write becomes 0.

    It may be in the middle of a recording, which learns nothing of it.
    """
    outside = _mine.recorder, _mine.memory
    _mine.recorder, _mine.memory, _mine.collected = None, Memory(), set()
    try:
        yield _mine.collected
    finally:
        (_mine.recorder, _mine.memory), _mine.collected = outside, None


class _Mine(threading.local):
    """What a thread has: who writes its kernels down, and what it needs to call one alone."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.collected: set[ChunkFunction] | None = None
        self.memory = Memory()
        self.list = workers.List(_MOST_ALONE)


_MOST_ALONE = 4  # operations of a kernel
_mine = _Mine()


def cut() -> None:
    """Where this thread is recorded: what follows goes into another program."""
    if _mine.recorder is not None:
        _mine.recorder.cut()


def memory() -> Memory:
    """Where the next operations of this thread have their arrays."""
    return _mine.recorder or _mine.memory


def call(operations: Sequence[Operation]) -> None:
    """Do the operations of a kernel, each after the one before, or write them down if this thread is recorded."""
    mine, alone = _mine, True
    if mine.recorder is not None:
        mine.recorder.operations += operations
        return
    if mine.collected is not None:
        for operation in operations:
            mine.collected.add(operation.function)
            for array in operation.writes:
                array.fill(0)
        return
    for i, operation in enumerate(operations):
        operation.lay_out(mine.list.rows, i, i > 0)
        alone &= operation.chunks == 1 and operation.window < 0
    workers.run(mine.list, len(operations), 1 if alone else threads(), mine.list)


def _place(k_cache: np.ndarray, v_cache: np.ndarray) -> np.ndarray:
    return np.array([k_cache.ctypes.data, v_cache.ctypes.data, len(k_cache)], np.int64)


def _waits(operations: Iterable[Operation]) -> Iterator[bool]:
    """Whether an operation touches what unfinished ones write, or writes what they read."""
    read: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []
    appended: list[tuple[int, int]] = []
    for operation in operations:
        reads, writes, appends = (_ranges(a) for a in (operation.reads, operation.writes, operation.appends))
        waits = _overlap(reads + writes, written + appended) or _overlap(writes + appends, read)
        waits = waits or _overlap(appends, written)
        if waits:
            read, written, appended = [], [], []
        read, written, appended = read + reads, written + writes, appended + appends
        yield waits


def _ranges(arrays: tuple[np.ndarray, ...]) -> list[tuple[int, int]]:
    return [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in arrays]


def _overlap(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> bool:
    return any(a < d and c < b for a, b in some for c, d in others)
