"""What a generator yields, kept: it runs only while somebody reads, and may be read again.

Owns: one reader at a time, the error that is raised again, ending it from another thread. Does not know: what is
yielded.
"""

import inspect
import threading
from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from edge_gemma.errors import EdgeGemmaError, UsageError

STOPPING_S = 10.0  # a thread that stops a generator reads its end: another that reads waits for it so long at most
_T = TypeVar("_T")


class Replay(Generic[_T]):
    """Iterate over it from the beginning, any number of times. seen: what was yielded until now."""

    def __init__(self, what: str, running: Generator[_T, None, None], stopping: threading.Event) -> None:
        """what: its name in errors. stopping: once it is set, `running` has to end soon."""
        self.seen: list[_T] = []
        self.begun = False
        self._what, self._running, self._stopping = what, running, stopping
        self._error: EdgeGemmaError | None = None
        self._reading = threading.Lock()

    def __iter__(self) -> Iterator[_T]:
        """Raises what the generator raises, and UsageError while another thread reads."""
        at = 0
        while at < len(self.seen) or self._go_on():
            yield self.seen[at]
            at += 1

    def stop(self, *, unread: bool) -> None:
        """End it, from any thread: what it yields last is seen. unread: run the end of one that nobody has read too."""
        self._stopping.set()
        if self._reading.acquire(blocking=False):  # nobody is computing the next one
            try:
                self._end(unread)
            finally:
                self._reading.release()

    def _go_on(self) -> bool:
        """See one more. Returns False at the end."""
        if not self._reading.acquire(timeout=STOPPING_S if self._stopping.is_set() else 0):
            raise UsageError(f"this {self._what} is being read in another thread: read it in one, or stop it")
        try:
            if self._error is not None:
                raise self._error
            self.begun = True
            item = next(self._running, None)
            if item is not None:
                self.seen.append(item)
            if self._stopping.is_set():
                self._end(unread=True)
            return item is not None
        except EdgeGemmaError as error:
            self._error = error
            raise
        finally:
            self._reading.release()

    def _end(self, unread: bool) -> None:
        if not unread and inspect.getgeneratorstate(self._running) == inspect.GEN_CREATED:
            self._running.close()
        self.begun = True
        self.seen += self._running
