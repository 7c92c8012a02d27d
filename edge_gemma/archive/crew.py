"""Who works: processes on this machine. Others are in dask_crew.py, behind the same few calls.

Owns: handing works to processes, telling what became of them. Does not know: what is worked, when it is tried again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, Protocol

from edge_gemma.archive.child import Charge, Child, CrashedError, FailedError, reason
from edge_gemma.host.pool import Pool


@dataclass(frozen=True)
class Outcome:
    """What became of a work. value: the result; otherwise the reason, in one line.

    failed: it cannot be done. crashed: it, or what was done beside it, has ended the process. lost: nothing can be done
    any more. unfit, gone: not by this worker any more, or its result went with it (dask_crew.py, which tells nobody).
    """

    kind: Literal["done", "failed", "crashed", "lost", "unfit", "gone"]
    value: Any


Told = Callable[[int, Outcome], None]


class Crew(Protocol):
    """Processes that work, here or elsewhere."""

    @property
    def slots(self) -> int:
        """How many works are done at a time. It may change."""
        ...

    def submit(self, number: int, work: Any, *, alone: bool) -> None:
        """Have a work done. Any thread may then call `told` with its number. alone: as in Child.do."""
        ...

    def tend(self) -> None:
        """Called every second or so. Raises EdgeGemmaError, one line, where work cannot go on."""
        ...

    def close(self) -> None:
        """End all work."""
        ...


def outcome(do: Callable[[], Any]) -> Outcome:
    """What becomes of a work."""
    try:
        return Outcome("done", do())
    except FailedError as error:
        return Outcome("failed", str(error))
    except CrashedError as error:
        return Outcome("crashed", str(error))
    except Exception as error:
        return Outcome("lost", reason(error))


class LocalCrew:
    """Processes of this command."""

    def __init__(self, charge: Charge, workers: int, told: Told) -> None:
        """workers: processes, each with the charge's slots."""
        self.children: Sequence[Child] = [Child(charge) for _ in range(workers)]
        self.slots = workers * charge.slots
        self._told, self._choosing = told, Lock()
        self._given = dict.fromkeys(self.children, 0)
        self._threads = Pool(self.slots, thread_name_prefix="archive-worker")

    def submit(self, number: int, work: Any, *, alone: bool) -> None:
        """As Crew.submit."""
        self._threads.submit(self._do, number, work, alone)

    def _do(self, number: int, work: Any, alone: bool) -> None:
        with self._choosing:
            child = min(self.children, key=self._given.__getitem__)
            self._given[child] += 1
        found = outcome(lambda: child.do(work, alone=alone))
        with self._choosing:
            self._given[child] -= 1
        self._told(number, found)

    def tend(self) -> None:
        """As Crew.tend."""

    def close(self) -> None:
        """As Crew.close."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self.children:
            child.close()
