"""How many threads a kernel call uses.

Owns: the choice. Does not know: the threads themselves (workers.py).
"""

import functools
import os
import threading

from edge_gemma.errors import UsageError
from edge_gemma.host import cpus

__all__ = ["checked_threads", "set_threads", "threads", "use_threads"]

MOST = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads of a call, at most."""

_caller = threading.local()  # .limit: what `use_threads` asks for here
_threads: int | None = None


def checked_threads(threads: int | None) -> int | None:
    """`threads`, None for the default. Raises UsageError for a number that this machine does not have."""
    if threads is not None and not 1 <= threads <= MOST:
        raise UsageError(f"{threads} threads, expected 1 to {MOST} on this machine")
    return threads


def set_threads(threads: int | None) -> None:
    """Threads of every later kernel call outside `use_threads`, in every thread of this process. None: the default."""
    global _threads
    _threads = checked_threads(threads)


class use_threads:
    """Inside, kernels that this thread calls use so many threads. None: as many as outside.

    Not a generator, which would cost 3 us at every token.
    """

    def __init__(self, threads: int | None) -> None:
        self._threads = threads

    def __enter__(self) -> None:
        self._outside = getattr(_caller, "limit", None)
        _caller.limit = self._threads or self._outside

    def __exit__(self, *_: object) -> None:
        _caller.limit = self._outside


def threads() -> int:
    """Threads a kernel call uses here: what `use_threads` or `set_threads` say, else one for each CPU (cpus.py)."""
    return getattr(_caller, "limit", None) or _threads or _default_threads()


@functools.cache
def _default_threads() -> int:
    return min(MOST, cpus.available())
