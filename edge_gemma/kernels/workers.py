"""The threads that kernels share: a fixed few for the whole process, which wait where they disturb nobody.

    workers.run(operations, length, 2, keep)     # operations in order, by this thread and one more

Every thread goes through the whole list and claims chunks of an operation until none is left; before an operation that
reads what earlier ones wrote it waits for their claimed chunks to be finished. So a slow core takes fewer chunks,
nobody waits for a thread that has not come, and one thread alone does everything. Results do not depend on who did
what.

Whoever calls `run` works too, and returns when the chunks are finished, not when the others have noticed: a worker that
another program keeps from its core delays nobody, unless it holds a chunk. Such a worker comes back later, to counters
that may count for another run. So each run has a number of its own, which is part of what a claim compares and swaps.

A worker without work spins for _SPIN_S, then sleeps until there is some.

Owns: the worker threads, claims, waiting. Does not know: what an operation computes (recording/operation.py).
"""

import atexit
import ctypes
import math
import os
import threading
import time

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import compiler
from edge_gemma.kernels.compiler import ChunkFunction, chunk_function, inner
from edge_gemma.kernels.isa import I32, I64, call
from edge_gemma.kernels.recording.operation import BLOCK, CHUNKS, FUNCTION, POSITION, WAITS, WINDOW, WORDS

_LINE = 64  # bytes of a cache line: claims of two operations share none
_CLAIMED, _FINISHED = 0, 8  # bytes in an operation's line: run << 32 | chunks claimed; chunks finished
_ROWS, _LINES, _COUNTS, _LENGTH, _THREADS, _INSIDE = range(0, 48, 8)  # bytes in a list's head
_RUN, _LIST, _WORKERS = 0, 64, 72  # bytes in the state: 2 run + 1 while one is on; its list's head; slots
_SLOTS = 128  # bytes in the state: a line for each worker, the run that it is in, -1 for none
_RUNS = 1 << 30  # numbers of runs
_SPINS = 4000  # turns a thread waits for chunks of others before it offers its core to someone else
_SPIN_S = 0.0005  # a worker waits so long for the next run before it sleeps: longer than a sampler takes

# --- compiled ---------------------------------------------------------------------------------------------------------


def _place(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def read(typing_context, address):
    """The int64 at an address."""

    def emit(context, builder, signature, arguments):
        return builder.load_atomic(_place(builder, arguments[0]), "seq_cst", 8)

    return types.int64(types.int64), emit


@intrinsic
def write(typing_context, address, value):
    """Put an int64 at an address."""

    def emit(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _place(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def count_one(typing_context, address):
    """Add 1 to the int64 at an address."""

    def emit(context, builder, signature, arguments):
        builder.atomic_rmw("add", _place(builder, arguments[0]), I64(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def swap(typing_context, address, old, new):
    """Put `new` at an address if `old` is there. What was there."""

    def emit(context, builder, signature, arguments):
        place = _place(builder, arguments[0])
        return builder.extract_value(builder.cmpxchg(place, arguments[1], arguments[2], "acq_rel", "acquire"), 0)

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def invoke(typing_context, row, chunk):
    """Call an operation's function."""

    def emit(context, builder, signature, arguments):
        row, chunk = arguments
        kind = ir.FunctionType(ir.VoidType(), [I64] * 2).as_pointer()
        function = builder.load(_place(builder, builder.add(row, I64(8 * FUNCTION))))
        builder.call(builder.inttoptr(function, kind), [row, chunk])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def pause(typing_context):
    """Tell the core that this thread waits for another."""

    def emit(context, builder, signature, arguments):
        triple = compiler.target(context)[0]
        if triple.startswith("x86_64"):
            call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith("aarch64"):
            call(builder, "llvm.aarch64.hint", ir.VoidType(), I32(1))
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def offer_core(typing_context):
    """sched_yield(), on Windows SwitchToThread(): let another process run."""

    def emit(context, builder, signature, arguments):
        windows = "windows" in compiler.target(context)[0]
        call(builder, "SwitchToThread" if windows else "sched_yield", I32)
        return context.get_dummy_value()

    return types.void(), emit


@inner()
def _chunks(row):
    """How many chunks an operation has at its token's position."""
    chunks, window = read(row + 8 * CHUNKS), read(row + 8 * WINDOW)
    if window < 0:
        return chunks
    position = read(read(row + 8 * POSITION))
    low = max(0, position - window + 1) if window else 0
    return chunks * (position // BLOCK + 1 - low // BLOCK)


@inner()
def _claim(line, run, chunk, count):
    """The next chunk of an operation, `chunk` or a later one; `count` when all are claimed, or in another run."""
    while chunk < count:
        expected = run << 32 | chunk
        found = swap(line + _CLAIMED, expected, expected + 1)
        if found == expected:
            return chunk
        chunk = found & 0xFFFFFFFF if found >> 32 == run else count
    return count


@inner()
def _wait(state, line, count, run):
    """Until all chunks of an operation are finished; False when the run is over."""
    turns = 0
    while read(line + _FINISHED) < count:
        if read(state + _RUN) >> 1 != run:
            return False
        turns += 1
        if turns < _SPINS:
            pause()
        else:
            offer_core()
    return True


@inner()
def _work_through(state, head, run):
    rows, lines, counts = read(head + _ROWS), read(head + _LINES), read(head + _COUNTS)
    begin = 0
    for i in range(read(head + _LENGTH)):
        row, line, count = rows + i * 8 * WORDS, lines + i * _LINE, read(counts + i * 8)
        if read(row + 8 * WAITS):
            for j in range(begin, i):
                if not _wait(state, lines + j * _LINE, read(counts + j * 8), run):
                    return
            begin = i
        chunk = _claim(line, run, 0, count)
        while chunk < count:
            invoke(row, chunk)
            count_one(line + _FINISHED)
            chunk = _claim(line, run, chunk + 1, count)


@chunk_function("lead")
def _lead(state, head):
    """A run, from its beginning to its end. _INSIDE becomes the number of workers that have not left then."""
    run = ((read(state + _RUN) >> 1) + 1) % _RUNS
    rows, lines, counts, length = read(head + _ROWS), read(head + _LINES), read(head + _COUNTS), read(head + _LENGTH)
    for i in range(length):
        write(lines + i * _LINE + _CLAIMED, run << 32)
        write(lines + i * _LINE + _FINISHED, 0)
        write(counts + i * 8, _chunks(rows + i * 8 * WORDS))
    write(state + _LIST, head)
    write(state + _RUN, 2 * run + 1)
    _work_through(state, head, run)
    for i in range(length):
        _wait(state, lines + i * _LINE, read(counts + i * 8), run)
    write(state + _RUN, 2 * run)
    inside = 0
    for worker in range(read(state + _WORKERS)):
        inside += read(state + _SLOTS + worker * _LINE) != -1
    write(head + _INSIDE, inside)


@chunk_function("follow")
def _follow(request, worker):
    """A worker's part in every run, until there was none for some turns. request: the state's address, those turns."""
    state = read(request)
    mine = state + _SLOTS + worker * _LINE
    last, idle = -1, 0
    while idle < read(request + 8):
        run = read(state + _RUN)
        if run & 1 and run != last:
            write(mine, run >> 1)
            if read(state + _RUN) == run:
                head = read(state + _LIST)
                if read(head + _THREADS) > worker + 1:
                    _work_through(state, head, run >> 1)
                    idle = 0
                last = run
            write(mine, -1)
        else:
            pause()
            idle += 1


# --- Python's side ----------------------------------------------------------------------------------------------------


def functions() -> set[ChunkFunction]:
    """What the workers themselves are compiled from."""
    return {_lead, _follow}


class List:
    """Rows of operations (recording/operation.py) as the workers take them: int64 [most, WORDS]."""

    def __init__(self, most: int) -> None:
        self.rows = np.zeros((most, WORDS), np.int64)
        self._lines = np.zeros((most, _LINE // 8), np.int64)
        self._counts = np.zeros(most, np.int64)
        addresses = (array.ctypes.data for array in (self.rows, self._lines, self._counts))
        self._head = np.array([*addresses, most, 1, 0], np.int64)
        self.address = self._head.ctypes.data

    def begin(self, length: int, threads: int) -> None:
        """So many of the rows are to be done by so many threads."""
        self._head[_LENGTH // 8], self._head[_THREADS // 8] = length, threads

    @property
    def inside(self) -> bool:
        """Whether a worker still looked at some list when the last run of this one ended."""
        return self._head[_INSIDE // 8] != 0


def _callable(function: ChunkFunction) -> ctypes._CFuncPtr:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(function.address)


def _turns() -> int:
    """How many turns a worker without work takes in _SPIN_S, on this machine."""
    state = np.zeros((_SLOTS + _LINE) // 8, np.int64)  # of workers that are never asked
    request, least = np.array([state.ctypes.data, 10_000], np.int64), math.inf
    for _ in range(4):
        begin = time.perf_counter()
        _callable(_follow)(request.ctypes.data, 0)
        least = min(least, time.perf_counter() - begin)
    return min(1 << 20, int(10_000 * _SPIN_S / least))


class Workers:
    """Threads that wait for runs. One run at a time; threads that ask for another wait."""

    def __init__(self, most: int) -> None:
        """most: threads, with the caller's."""
        self._state = np.full((_SLOTS + most * _LINE) // 8, -1, np.int64)
        self._state[: _SLOTS // 8] = 0
        self._state[_WORKERS // 8] = most
        self._address = self._state.ctypes.data
        self._one_at_a_time = threading.Lock()
        self._changed = threading.Condition()
        self._runs = 0  # that workers were asked to take part in
        self._asleep = 0
        self._threads: list[threading.Thread] = []
        self._requests = np.zeros((most, 2), np.int64)  # of each worker: the state's address, turns
        self._requests[:, 0] = self._address
        self._ended = False
        self._lead = _callable(_lead)
        self._kept: set[object] = set()  # what a worker that came too late may still look at

    def run(self, operations: List, length: int, threads: int, keep: object) -> None:
        """Do the first operations, so many, in their order. keep: what stays alive as long as a worker may look."""
        with self._one_at_a_time:
            if threads > 1:
                self._wake(threads - 1)
            operations.begin(length, threads)
            self._lead(self._address, operations.address)
            if operations.inside:
                self._kept.add(keep)
            elif self._kept:
                self._kept.clear()

    def _wake(self, workers: int) -> None:
        self._runs += 1
        while len(self._threads) < workers and not self._ended:
            worker = len(self._threads)
            _ = _follow.address  # compiled here, once
            thread = threading.Thread(target=self._serve, args=(worker,), name="edge-gemma-kernels", daemon=True)
            self._threads.append(thread)
            thread.start()
        if self._asleep:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """End the workers; what is run from now on is done by its caller. Compiled code goes with the interpreter, and
        nobody may be in it then.
        """
        with self._one_at_a_time:
            self._ended = True
            self._requests[:, 1] = 0
            self._wake(0)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(1.0)

    def _serve(self, worker: int) -> None:
        follow, request, turns = _callable(_follow), self._requests[worker], _turns()
        while not self._ended:
            runs, request[1] = self._runs, turns
            follow(request.ctypes.data, worker)
            with self._changed:
                self._asleep += 1
                while self._runs == runs and not self._ended:
                    self._changed.wait()
                self._asleep -= 1


_workers: Workers | None = None
_making = threading.Lock()


def run(operations: List, length: int, threads: int, keep: object) -> None:
    """Do operations in their order, by this thread and others: as `Workers.run`."""
    global _workers
    if _workers is None:
        with _making:
            _workers = _workers or Workers(numba.config.NUMBA_NUM_THREADS)
    _workers.run(operations, length, threads, keep)


@atexit.register
def _close() -> None:
    if _workers is not None:
        _workers.close()


def _after_fork() -> None:
    """In the child. Its parent's other threads are gone, and with them whoever holds a lock."""
    global _workers, _making
    _workers, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
