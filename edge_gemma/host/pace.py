"""Chooses the number of threads: fewer while other programs keep CPUs busy.

A kernel's work is divided evenly and all threads wait for the last, so a CPU that another program uses too delays every
thread. Waiting threads use no CPU time. If a run gets less CPU time than its threads could have had, one thread fewer
is tried, and kept if it is not slower. After a while one more is tried again. Results do not depend on the number.

Owns: the measurements and the choice. Does not know: what is run.
"""

import time
from collections.abc import Callable
from types import TracebackType

_UNIT_S = 0.004  # seconds of work that are judged together: one token of a small model is too short
_BUSY = 0.85  # share of the CPU time; on an idle machine E2B has 0.95, short prompts of a tiny model 0.8
_BETTER = 1.05  # times faster that one more thread has to be
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 4.0  # between two tries; a try in vain doubles it


class Pace:
    """Measures the runs of one session, `with pace.of(tokens): ...`, and chooses the threads of the next: `limit`.

    limit: threads, None for all that are allowed. asked: the number that was asked for, or None.
    """

    def __init__(
        self,
        threads: int | None,
        most: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        """threads: a number that was asked for, which then never changes; None lets this class choose, up to `most`.

        clock: seconds of wall time. cpu: seconds of CPU time of all threads.
        """
        self.limit = self.asked = threads
        self._fixed, self._most, self._clock, self._cpu = threads is not None, most, clock, cpu
        self._next, self._wait = clock(), _FIRST_WAIT_S
        self._reset(1)

    def _reset(self, tokens: int) -> None:
        self._prompt = tokens > 1  # the speeds of prompts and of single tokens cannot be compared
        self._seconds = self._cpu_seconds = 0.0
        self._tokens = 0
        self._before: tuple[float, int | None] | None = None  # speed and limit before the current try

    def of(self, tokens: int) -> "Pace":
        """The context manager for a run of so many tokens."""
        self._running = tokens
        return self

    def __enter__(self) -> None:
        if not self._fixed:
            self._start, self._cpu_start = self._clock(), self._cpu()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fixed:
            return
        if self._prompt != (self._running > 1):
            self._reset(self._running)
        now = self._clock()
        self._seconds += now - self._start
        self._cpu_seconds += self._cpu() - self._cpu_start
        self._tokens += self._running
        if self._seconds >= _UNIT_S:
            threads = self.limit or self._most
            self._judge(now, self._tokens / self._seconds, self._cpu_seconds / self._seconds / threads, threads)
            self._seconds = self._cpu_seconds = 0.0
            self._tokens = 0

    def _judge(self, now: float, speed: float, share: float, threads: int) -> None:
        """Choose the next limit. speed: tokens a second. share: of the CPU time that the threads could have had."""
        if self._before is not None:
            (speed_before, limit), self._before = self._before, None
            fewer = threads < (limit or self._most)
            if speed < speed_before * (1.0 if fewer else _BETTER):
                self.limit, self._wait = limit, min(2 * self._wait, _LONGEST_WAIT_S)
            else:
                self._wait = _FIRST_WAIT_S
            self._next = now + self._wait
        elif now >= self._next and share < _BUSY and threads > 1:
            self._before, self.limit = (speed, self.limit), threads - 1
        elif now >= self._next and threads < self._most:
            self._before = speed, self.limit
            self.limit = threads + 1 if threads + 1 < self._most else None
