"""Who computes now: one thread at a time, live speech first.

A model keeps every core busy, so two threads that compute at once both take longer than one after the other.

Owns: `Turns`, and `Stopped`, which ends work that nobody waits for. Does not know: what is computed, requests.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

LIVE, ASKED = 0, 1  # ranks: speech that arrives now, everything else
SLICE_S = 0.1  # work of one rank takes turns after that long


class Stopped(Exception):
    """Nobody waits for this work any more."""


@dataclass
class _Turn:
    """What one thread may do."""

    rank: int
    stopping: threading.Event
    since: float = field(default_factory=time.monotonic)
    held: bool = False


class Turns:
    """Lets one thread compute at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []  # heap of (rank, ticket)
        self._tickets = itertools.count()
        self._taken = False
        self._mine = threading.local()

    @contextmanager
    def turn(self, rank: int, stopping: threading.Event) -> Iterator[None]:
        """Held while this thread computes. stopping: once it is set, `between` raises Stopped in this thread.

        Raises Stopped if it is set before the turn comes.
        """
        self._mine.turn = turn = _Turn(rank, stopping)
        self._take(turn)
        try:
            yield
        finally:
            self._mine.turn = None
            if turn.held:
                self._give(turn)

    @contextmanager
    def rest(self) -> Iterator[None]:
        """This thread waits for something and computes nothing meanwhile: its turn goes to others, and comes back.

        Raises Stopped.
        """
        turn: _Turn = self._mine.turn
        self._give(turn)
        yield
        self._take(turn)

    def between(self) -> None:
        """Called often by a thread that computes: it lets others go first. Threads without a turn pass.

        Raises Stopped. The turn is still held then.
        """
        turn: _Turn | None = getattr(self._mine, "turn", None)
        if turn is None:
            return
        if turn.stopping.is_set():
            raise Stopped
        if self._waiting and self._is_due(turn):
            self._give(turn)
            self._take(turn, for_ever=True)
            if turn.stopping.is_set():
                raise Stopped

    def _is_due(self, turn: _Turn) -> bool:
        """Whether somebody waits who goes before `turn`."""
        with self._changed:
            first = min(self._waiting, default=(turn.rank + 1, 0))[0]
        return first < turn.rank or (first == turn.rank and time.monotonic() - turn.since > SLICE_S)

    def _take(self, turn: _Turn, *, for_ever: bool = False) -> None:
        place = turn.rank, next(self._tickets)
        with self._changed:
            heapq.heappush(self._waiting, place)
            while self._taken or self._waiting[0] != place:
                self._changed.wait(0.05 if not for_ever else None)
                if not for_ever and turn.stopping.is_set():
                    self._waiting.remove(place)
                    heapq.heapify(self._waiting)
                    self._changed.notify_all()
                    raise Stopped
            heapq.heappop(self._waiting)
            self._taken = turn.held = True
        turn.since = time.monotonic()

    def _give(self, turn: _Turn) -> None:
        with self._changed:
            self._taken = turn.held = False
            self._changed.notify_all()
