"""The threads that kernels share: a fixed few for the whole process, which wait where they disturb nobody.

    workers.run(rows, counters, 2)     # operations in order, by this thread and one more

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

import ctypes
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

LINE = 8
"""int64 in a cache line: counters of two operations share none."""
_CLAIMED, _FINISHED, _COUNT = 0, 8, 16  # bytes in an operation's line: run << 32 | chunks claimed; finished; all chunks
_RUN, _ROWS, _COUNTERS, _OPERATIONS, _THREADS = 0, 64, 72, 80, 88  # bytes in the state: 2 run + 1 while one is on
_INSIDE = 128  # bytes in the state: a line for each worker, the run that it is in
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
    """Put `new` at an address if `old` is there; whether it was."""

    def emit(context, builder, signature, arguments):
        place = _place(builder, arguments[0])
        return builder.extract_value(builder.cmpxchg(place, arguments[1], arguments[2], "acq_rel", "acquire"), 1)

    return types.boolean(types.int64, types.int64, types.int64), emit


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
def _claim(line, run):
    """The next chunk of an operation; -1 when all are claimed, or when the counters count for another run."""
    count = read(line + _COUNT)
    while True:
        claimed = read(line + _CLAIMED)
        chunk = claimed & 0xFFFFFFFF
        if claimed >> 32 != run or chunk >= count:
            return -1
        if swap(line + _CLAIMED, claimed, claimed + 1):
            return chunk


@inner()
def _wait(state, line, run):
    """Until all chunks of an operation are finished; False when the run is over."""
    turns = 0
    while read(line + _FINISHED) < read(line + _COUNT):
        if read(state + _RUN) >> 1 != run:
            return False
        turns += 1
        if turns < _SPINS:
            pause()
        else:
            offer_core()
    return True


@inner()
def _work_through(state, rows, counters, operations, run):
    begin = 0
    for i in range(operations):
        row, line = rows + i * 8 * WORDS, counters + i * 8 * LINE
        if read(row + 8 * WAITS):
            for j in range(begin, i):
                if not _wait(state, counters + j * 8 * LINE, run):
                    return
            begin = i
        chunk = _claim(line, run)
        while chunk >= 0:
            invoke(row, chunk)
            count_one(line + _FINISHED)
            chunk = _claim(line, run)


@chunk_function("lead")
def _lead(state, workers):
    """A run, from its beginning to its end. Afterwards _THREADS says how many of the workers have not left yet."""
    run = ((read(state + _RUN) >> 1) + 1) % _RUNS
    rows, counters, operations = read(state + _ROWS), read(state + _COUNTERS), read(state + _OPERATIONS)
    for i in range(operations):
        line = counters + i * 8 * LINE
        write(line + _CLAIMED, run << 32)
        write(line + _FINISHED, 0)
        write(line + _COUNT, _chunks(rows + i * 8 * WORDS))
    write(state + _RUN, 2 * run + 1)
    _work_through(state, rows, counters, operations, run)
    for i in range(operations):
        _wait(state, counters + i * 8 * LINE, run)
    write(state + _RUN, 2 * run)
    inside = 0
    for worker in range(workers):
        inside += read(state + _INSIDE + worker * 8 * LINE) != -1
    write(state + _THREADS, inside)


@chunk_function("follow")
def _follow(request, worker):
    """A worker's part in every run, until there was none for some turns. request: the state's address, those turns."""
    state, turns = read(request), read(request + 8)
    mine = state + _INSIDE + worker * 8 * LINE
    last, idle = -1, 0
    while idle < turns:
        run = read(state + _RUN)
        if run & 1 and run != last and read(state + _THREADS) > worker + 1:
            write(mine, run >> 1)
            if read(state + _RUN) == run:
                _work_through(state, read(state + _ROWS), read(state + _COUNTERS), read(state + _OPERATIONS), run >> 1)
                last, idle = run, 0
            write(mine, -1)
        else:
            pause()
            idle += 1


# --- Python's side ----------------------------------------------------------------------------------------------------


def _callable(function: ChunkFunction) -> ctypes._CFuncPtr:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(function.address)


class Workers:
    """Threads that wait for runs. One run at a time; threads that ask for another wait."""

    def __init__(self, most: int) -> None:
        """most: threads, with the caller's."""
        self._state = np.full(_INSIDE // 8 + most * LINE, -1, np.int64)
        self._state[: _INSIDE // 8] = 0
        self._address = self._state.ctypes.data
        self._one_at_a_time = threading.Lock()
        self._changed = threading.Condition()
        self._runs = 0  # that workers were asked to take part in
        self._asleep = 0
        self._started = 0
        self._lead = None
        self._kept: dict[int, object] = {}  # what a worker that came too late may still look at

    def run(self, rows: np.ndarray, counters: np.ndarray, threads: int) -> None:
        """Do operations in their order. rows: int64 [n, WORDS]; counters: int64 [n, LINE], of no meaning."""
        with self._one_at_a_time:
            if self._lead is None:
                self._lead = _callable(_lead)
            if threads > 1:
                self._wake(threads - 1)
            state = self._state
            state[_ROWS // 8 : _THREADS // 8 + 1] = rows.ctypes.data, counters.ctypes.data, len(rows), threads
            self._lead(self._address, self._started)
            if state[_THREADS // 8]:
                self._kept[rows.ctypes.data] = rows, counters
            elif self._kept:
                self._kept.clear()

    def _wake(self, workers: int) -> None:
        self._runs += 1
        while self._started < workers:
            thread = threading.Thread(target=self._serve, args=(self._started,), name="edge-gemma-kernels", daemon=True)
            _ = _follow.address  # compiled here, once
            self._started += 1
            thread.start()
        if self._asleep:
            with self._changed:
                self._changed.notify_all()

    def _serve(self, worker: int) -> None:
        follow, request = _callable(_follow), np.array([self._address, 1000], np.int64)
        follow(request.ctypes.data, worker)  # loaded
        begin = time.perf_counter()
        follow(request.ctypes.data, worker)
        request[1] = min(1 << 20, 1000 * _SPIN_S / max(time.perf_counter() - begin, 1e-6))
        while True:
            runs = self._runs
            follow(request.ctypes.data, worker)
            with self._changed:
                self._asleep += 1
                while self._runs == runs:
                    self._changed.wait()
                self._asleep -= 1


_workers: Workers | None = None
_making = threading.Lock()


def run(rows: np.ndarray, counters: np.ndarray, threads: int) -> None:
    """Do operations in their order, by this thread and others. rows, counters: as `Workers.run` takes them."""
    global _workers
    if _workers is None:
        with _making:
            _workers = _workers or Workers(numba.config.NUMBA_NUM_THREADS)
    _workers.run(rows, counters, threads)


def _after_fork() -> None:
    """In the child. Its parent's other threads are gone, and with them whoever holds a lock."""
    global _workers, _making
    _workers, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
