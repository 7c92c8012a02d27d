"""Charges for tests: work that takes its time, that ends its own process, and files whose reading does.

Processes of workers import this module: PYTHONPATH has to name the repository.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_gemma.archive.reading import ReaderCharge, read
from edge_gemma.archive.working import ModelCharge
from tests.archive.clips import LATE_S
from tests.waiting import until

DEADLY, MIDWAY = "deadly", "midway"  # in names of files that end the process that reads them
_MARGIN_S = 1.0


def end(ending: int) -> None:
    """End this process as a crash would."""
    os.kill(os.getpid(), ending)
    time.sleep(60)


def tell(log: str, text: str) -> None:
    """Add a line to a file, whole, whoever else does."""
    if log:
        with open(log, "ab", buffering=0) as file:
            file.write(text.encode() + b"\n")


def told(log: Path) -> list[str]:
    """What was told."""
    return log.read_text().splitlines() if log.exists() else []


class _Busy:
    """How many works are being done in this process."""

    def __init__(self) -> None:
        self.count, self._guard = 0, threading.Lock()

    def add(self, more: int) -> int:
        """Returns how many there are."""
        with self._guard:
            self.count += more
            return self.count


@dataclass(frozen=True)
class Poisoned(ModelCharge):
    """A model whose process ends when it hears a clip that is late (clips.py).

    sleep_s: that each work takes longer. ending: a signal; 0 for none. log: a file that gets a line for each work
    ("work PID", "deadly PID WORKS"), the latter with how many were being done in the process.
    """

    sleep_s: float = 0.2
    ending: int = 0
    log: str = ""

    def open(self) -> Callable[[Any, Any], Any]:
        """As Charge.open."""
        do, busy = super().open(), _Busy()

        def slowly(work: Any, emit: Any) -> Any:
            busy.add(1)
            try:
                time.sleep(self.sleep_s)
                if self.ending and work.start > LATE_S - _MARGIN_S:
                    if not any(line.startswith("deadly") for line in told(Path(self.log))):
                        until(lambda: busy.count > 1)  # the first time it has company
                    tell(self.log, f"deadly {os.getpid()} {busy.count}")
                    end(self.ending)
                tell(self.log, f"work {os.getpid()}")
                return do(work, emit)
            finally:
                busy.add(-1)

        return slowly


@dataclass(frozen=True)
class PoisonedReader(ReaderCharge):
    """A reader whose process ends at files with DEADLY in their names, and after some parts with MIDWAY."""

    log: str = ""

    def open(self) -> Callable[[Any, Any], Any]:
        """As Charge.open."""

        def deadly(file: str, emit: Any) -> None:
            name = Path(file).name
            if DEADLY in name:
                tell(self.log, f"deadly {name}")
                end(signal.SIGSEGV)

            def emit_one(part: Any) -> None:
                emit(part)
                tell(self.log, f"deadly {name}")
                time.sleep(0.3)
                end(signal.SIGKILL)

            read(file, emit_one if MIDWAY in name else emit)

        return deadly


@dataclass(frozen=True)
class Plain:
    """A charge without a model, which does as it is told: works are ("echo", x), ("emit", n), ("sleep", s), ("end",
    signal), ("fail", text), ("busy", s).
    """

    slots: int = 1
    opens: str = ""  # "fail", "end", or a file that is there once it has ended once
    log: str = ""

    def open(self) -> Callable[[Any, Any], Any]:
        """As Charge.open."""
        if self.opens == "fail":
            raise ValueError("this cannot\nbe opened")
        if self.opens == "end":
            tell(self.log, "opened")
            print("a last word", flush=True)
            end(signal.SIGABRT)
        if self.opens and not Path(self.opens).exists():
            Path(self.opens).touch()
            end(signal.SIGKILL)
        busy = _Busy()

        def do(work: tuple[str, Any], emit: Any) -> Any:
            what, value = work
            now = busy.add(1)
            try:
                return _plainly(what, value, now, emit)
            finally:
                busy.add(-1)

        def _plainly(what: str, value: Any, now: int, emit: Any) -> Any:
            if what == "end":
                print(f"it ends with {now} works", flush=True)
                end(value)
            elif what == "fail":
                raise ValueError(value)
            elif what in ("sleep", "busy"):
                tell(self.log, f"{what} {os.getpid()} {now}")
                time.sleep(value)
                return max(now, busy.count)
            elif what == "emit":
                for number in range(value):
                    tell(self.log, f"emit {number}")
                    emit(number)
            return value

        return do
