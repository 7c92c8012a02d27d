"""The time that a listener would only wait for sound, and what of it may be used.

Owns: measuring it, the share of it that work may take which is not needed. Does not know: the work.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")
_SHARE = 0.5  # of the time waited
_LONGEST_S = 0.3  # a longer piece of work would delay what is said meanwhile
_SHORTEST_S = 0.02


class Spare:
    """Counts the seconds in which a thread waits. A file, which is read as fast as it can be, gives none."""

    def __init__(
        self, *, clock: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.thread_time
    ) -> None:
        """clock: seconds of wall time. cpu: seconds of this thread's CPU time."""
        self._clock, self._cpu = clock, cpu
        self._seconds = 0.0

    def waiting(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yields the items. Counts how long the thread sleeps until each comes."""
        iterator = iter(items)
        while True:
            since = self._clock() - self._cpu()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._seconds += max(0.0, self._clock() - self._cpu() - since)
            yield item

    def use(self, work: Callable[[float], None]) -> None:
        """Call `work` with the seconds that it may take, if that is worth it. All that it takes is spent."""
        allowed = min(_SHARE * self._seconds, _LONGEST_S)
        if allowed >= _SHORTEST_S:
            start = self._clock()
            work(allowed)
            self._seconds = min(self._seconds, _LONGEST_S / _SHARE) - (self._clock() - start) / _SHARE
