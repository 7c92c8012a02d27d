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
from collections.abc import Callable

import numpy as np

from edge_gemma.kernels import thread_count
from edge_gemma.kernels.functions import ChunkFunction, chunk_function
from edge_gemma.kernels.recording.operation import WORDS

LINE = 64  # bytes of a cache line: claims of two operations share none
CLAIMED, FINISHED = 0, 8  # bytes in an operation's line: run << 32 | chunks claimed; chunks finished
ROWS, LINES, COUNTS, LENGTH, THREADS, INSIDE = range(0, 48, 8)  # bytes in a list's head
RUN, LIST, WORKERS = 0, 64, 72  # bytes in the state: 2 run + 1 while one is on; its list's head; slots
SLOTS = 128  # bytes in the state: a line for each worker, the run that it is in, -1 for none
RUNS = 1 << 30  # numbers of runs
SPINS = 4000  # turns a thread waits for chunks of others before it offers its core to someone else
_SPIN_S = 0.0005  # a worker waits so long for the next run before it sleeps: longer than a sampler takes
_lead = chunk_function("kernels.compiled.workers", "lead")
_follow = chunk_function("kernels.compiled.workers", "follow")


def functions() -> set[ChunkFunction]:
    """What the workers themselves are compiled from."""
    return {_lead, _follow}


class List:
    """Rows of operations (recording/operation.py) as the workers take them: int64 [most, WORDS]."""

    def __init__(self, most: int) -> None:
        self.rows = np.zeros((most, WORDS), np.int64)
        self._lines = np.zeros((most, LINE // 8), np.int64)
        self._counts = np.zeros(most, np.int64)
        addresses = (array.ctypes.data for array in (self.rows, self._lines, self._counts))
        self._head = np.array([*addresses, most, 1, 0], np.int64)
        self.address = self._head.ctypes.data

    def begin(self, length: int, threads: int) -> None:
        """So many of the rows are to be done by so many threads."""
        self._head[LENGTH // 8], self._head[THREADS // 8] = length, threads

    @property
    def inside(self) -> bool:
        """Whether a worker still looked at some list when the last run of this one ended."""
        return self._head[INSIDE // 8] != 0


def _callable(function: ChunkFunction) -> Callable[[int, int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(function.address)


def _turns() -> int:
    """How many turns a worker without work takes in _SPIN_S, on this machine."""
    state = np.zeros((SLOTS + LINE) // 8, np.int64)  # of workers that are never asked
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
        self._state = np.full((SLOTS + most * LINE) // 8, -1, np.int64)
        self._state[: SLOTS // 8] = 0
        self._state[WORKERS // 8] = most
        self._address = self._state.ctypes.data
        self._one_at_a_time = threading.Lock()
        self._lock = threading.RLock()  # host/pool.py says why it is entered itself
        self._changed = threading.Condition(self._lock)
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
            with self._lock:
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
            with self._lock:
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
            _workers = _workers or Workers(thread_count.MOST)
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
