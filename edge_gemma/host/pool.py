"""Threads for work that is handed out, which a Ctrl-C leaves in order wherever it arrives.

A condition of `threading` is written in Python: where its lock is waited for, an interruption that comes just then is
raised with the lock taken, and nobody gives it back. Whoever else needs the lock waits for ever, and the program with
them, at its end. So a `with` that the main thread shares with others takes the lock itself, which is C and does all or
nothing; and what the library does with conditions of its own is done with Ctrl-C held.

Owns: the pool. Does not know: what is done in it.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from edge_gemma.host import interrupts

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Pool(ThreadPoolExecutor):
    """A ThreadPoolExecutor to which work can be given while Ctrl-C arrives.

    The library counts its idle threads by a semaphore that every thread shares with whoever hands out work. A Ctrl-C
    there left it locked in one of some 1,000 exports that were interrupted in their first moments
    (docs/LOG.md#interrupted-locks).
    """

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """As ThreadPoolExecutor.submit, which `map` calls too. A Ctrl-C meanwhile is delivered afterwards."""
        with interrupts.held():
            return super().submit(fn, *args, **kwargs)
