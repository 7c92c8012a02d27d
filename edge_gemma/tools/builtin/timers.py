"""Timers and alarms: they ring once, and are gone when the program ends.

Owns: the waiting, the list. Does not know: how a ring is shown (the callback), how durations are spelled (numbers.py).
"""

import datetime
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_gemma.errors import UsageError
from edge_gemma.tools.builtin import numbers
from edge_gemma.tools.function import RunnableTool, tool

_MOST = 100  # that are set at the same time
_LOOK_S = 30.0  # an alarm follows a clock that is set meanwhile
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass
class Timer:
    """One that is set. at: when it rings, by `time.monotonic` for a timer, by `time.time` for an alarm."""

    kind: str
    name: str
    at: float
    clock: Callable[[], float]
    label: str | None = None
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def left(self) -> float:
        return self.at - self.clock()

    def __str__(self) -> str:
        rings = datetime.datetime.now() + datetime.timedelta(seconds=max(0.0, self.left) + 0.5)
        return f"{self.kind} {self.label or self.name}, rings {rings:%A %H:%M:%S}"


class Timers:
    """The timers of one program."""

    def __init__(self, ring: Callable[[str], None]) -> None:
        """ring: told, in a thread of its own, what rings."""
        self._ring = ring
        self._set: list[Timer] = []
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    @property
    def tools(self) -> list[RunnableTool]:
        """The tools, those that are used most first."""
        methods: list[Any] = [
            self.set_timer, self.set_alarm, self.cancel_timer, self.cancel_alarm, self.list_timers
        ]  # fmt: skip
        return [tool(method) for method in methods]

    def set_timer(self, duration: str, label: str | None = None) -> str:
        """Set a timer"""
        seconds = numbers.duration(duration)
        if seconds is None:
            raise UsageError(f"the duration is {duration}, expected one such as 10 minutes or 1 hour 30 minutes")
        self._start(Timer("timer", f"of {duration}", time.monotonic() + seconds, time.monotonic, label))
        return "ok"

    def set_alarm(self, time: str, day: str | None = None) -> str:
        """Set an alarm"""
        at = _moment(time, day, datetime.datetime.now())
        self._start(Timer("alarm", f"of {time}", at.timestamp(), _wall))
        return "ok"

    def cancel_timer(self, label: str | None = None) -> str:
        """Cancel a timer"""
        return self._cancel("timer", label)

    def cancel_alarm(self) -> str:
        """Cancel the alarm"""
        return self._cancel("alarm", None)

    def list_timers(self) -> list[str]:
        """List the timers and alarms that are set"""
        with self._lock:
            return [str(each) for each in self._set]

    def clear(self) -> None:
        """Cancel all of them."""
        with self._lock:
            for each in self._set:
                each.over.set()
            self._set.clear()

    def _start(self, timer: Timer) -> None:
        with self._lock:
            if len(self._set) >= _MOST:
                raise UsageError(f"{_MOST} timers are set already: cancel one")
            self._set.append(timer)
        threading.Thread(target=self._wait, args=(timer,), name=f"{timer.kind} {timer.name}", daemon=True).start()

    def _wait(self, timer: Timer) -> None:
        while (left := timer.left) > 0:
            if timer.over.wait(min(left, _LOOK_S)):
                return
        with self._lock:
            if timer not in self._set:
                return
            self._set.remove(timer)
        self._ring(f"{timer.kind} {timer.label or timer.name}")

    def _cancel(self, kind: str, label: str | None) -> str:
        """The one of that label or duration, or the next to ring if none is named. Raises UsageError for none."""
        with self._lock:
            found = sorted((each for each in self._set if each.kind == kind), key=lambda each: each.left)
            named = [each for each in found if label and label.lower() in f"{each.label} {each.name}".lower()]
            if label and len(found) > 1 and not named:
                raise UsageError(f"there is no {kind} {label}: there are {', '.join(map(str, found))}")
            if not found:
                raise UsageError(f"there is no {kind}")
            timer = (named or found)[0]
            self._set.remove(timer)
            timer.over.set()
        return "ok"


def _wall() -> float:
    return time.time()


def _moment(text: str, day: str | None, now: datetime.datetime) -> datetime.datetime:
    """The next such time of day. "6" is the next of 6 and 18 o'clock. Raises UsageError for what is no time or day."""
    said = numbers.time_of_day(text)
    if said is None:
        raise UsageError(f"the time is {text}, expected one such as 7:30 or 6 pm")
    hour, minute, exact = said
    date, fixed = _date(day, now)
    candidates = [date.replace(hour=hour, minute=minute, second=0, microsecond=0)]
    if not exact and not fixed and hour < 12:
        candidates.append(candidates[0] + datetime.timedelta(hours=12))
    later = [at for at in candidates if at > now]
    if later:
        return later[0]
    if fixed:
        raise UsageError(f"{text} {day} is over already")
    return candidates[0] + datetime.timedelta(days=1)


def _date(day: str | None, now: datetime.datetime) -> tuple[datetime.datetime, bool]:
    """The day that is meant, and whether one was named."""
    word = (day or "").lower().strip().removeprefix("on ").removeprefix("this ").removeprefix("next ")
    if word in ("", "today", "tonight"):
        return now, word == "today"
    if word in ("tomorrow", "tomorrow morning"):
        return now + datetime.timedelta(days=1), True
    if word in _DAYS:
        return now + datetime.timedelta(days=(_DAYS.index(word) - now.weekday()) % 7 or 7), True
    try:
        return datetime.datetime.combine(datetime.date.fromisoformat(word), now.time()), True
    except ValueError:
        raise UsageError(f"the day is {day}, expected today, tomorrow, a weekday or a date as {now:%Y-%m-%d}") from None
