"""Who computes now: one thread at a time, live speech first, then passes and prompts in turn.

A model keeps every core busy, so two threads that compute at once both take longer than one after the other. Threads
that write an answer wait for a pass together (`meeting`), without a turn: the one that runs it takes the turn for all.

Owns: `Turns`, and `Stopped`, which ends work that nobody waits for. Does not know: what is computed, requests.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LIVE, ASKED = 0, 1  # ranks: speech that arrives now, everything else
SLICE_S = 0.1  # a prompt lets others of its rank go first after that long
_LOOK_S = 0.05  # between two looks whether anybody waits for the work


class Stopped(Exception):
    """Nobody waits for this work any more."""


@dataclass(eq=False)
class _Turn:
    """What one thread may do. since: when its turn began. meets: whether it waits for a pass, or runs one."""

    rank: int
    stopping: threading.Event
    since: float = 0.0
    meets: bool = False

    def check(self) -> None:
        """Raises Stopped."""
        if self.stopping.is_set():
            raise Stopped


class Turns:
    """Lets one thread compute at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Turn] = []  # the longest first
        self._holder: _Turn | None = None
        self._last_met = False  # whether the last turn was a pass
        self.passes = self.steps = 0  # passes of those who met, and how often one has asked for one
        self._mine = threading.local()

    @contextmanager
    def turn(self, rank: int, stopping: threading.Event) -> Iterator[None]:
        """In it, this thread computes in turns, and has one at the beginning.

        stopping: once it is set, `between` raises Stopped in this thread. Raises Stopped if that is before the turn.
        """
        self._mine.turn = turn = _Turn(rank, stopping)
        try:
            self._take(turn)
            yield
        finally:
            self._mine.turn = None
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

    @contextmanager
    def meeting(self) -> Iterator[int | None]:
        """As Engine.meeting: this thread waits for a pass that one of those who meet runs. Others compute meanwhile.

        Whoever runs the pass calls `between` before. Afterwards no thread has a turn until it calls `between`. Those of
        one rank meet, and threads without turns. Raises Stopped.
        """
        turn: _Turn | None = getattr(self._mine, "turn", None)
        if turn is None:
            yield None
            return
        turn.check()
        self._give(turn)
        with self._changed:
            self.steps += 1
        turn.meets = True
        try:
            yield turn.rank
        finally:
            self._give(turn)
            turn.meets = False

    def between(self) -> None:
        """Called often by a thread that computes: it lets others go first, and takes its turn if it has none.

        Threads that take no turns pass. Raises Stopped.
        """
        turn: _Turn | None = getattr(self._mine, "turn", None)
        if turn is None:
            return
        turn.check()
        if self._holder is not turn:
            self._take(turn)
        elif self._waiting and self._is_due(turn):
            self._give(turn)
            self._take(turn)

    def _is_due(self, turn: _Turn) -> bool:
        """Whether somebody waits who goes before `turn`."""
        with self._changed:
            first = min((other.rank for other in self._waiting), default=turn.rank + 1)
        return first < turn.rank or (first == turn.rank and time.monotonic() - turn.since > SLICE_S)

    def _take(self, turn: _Turn) -> None:
        with self._changed:
            self._waiting.append(turn)
            self._pass_on()
            while self._holder is not turn and not turn.stopping.is_set():
                self._changed.wait(_LOOK_S)
        turn.check()

    def _give(self, turn: _Turn) -> None:
        """The thread has no turn any more, and waits for none."""
        with self._changed:
            if turn in self._waiting:
                self._waiting.remove(turn)
            if self._holder is turn:
                self._holder, self._last_met = None, turn.meets
                self.passes += turn.meets
                self._pass_on()

    def _pass_on(self) -> None:
        """A free turn goes to who waits: the first rank, and in it passes after prompts, prompts after passes.

        So no prompt delays a pass by more than a slice, however many there are, and none waits for ever.
        """
        if self._holder is None and self._waiting:
            following = min(self._waiting, key=lambda turn: (turn.rank, turn.meets is self._last_met))
            self._waiting.remove(following)
            self._holder, following.since = following, time.monotonic()
            self._changed.notify_all()
