"""The first start: what a model needs is compiled by all cores at once, each in a process of its own.

A compiler in Python has one core. So at the first function that is not kept on disk, everything that the opened models
need is listed, and children of this process (fork) compile it as well: whoever is free takes the next. A child shares
nothing but the folder of compiled code, from which this process then loads what others have made. Where a process
cannot be forked, or has threads that a child would miss, it compiles alone, each function when it is first used.

Owns: who compiles what. Does not know: models, how a function is compiled or kept (compiler.py).
"""

import contextlib
import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol

from edge_gemma.host import cpus
from edge_gemma.kernels import compiler
from edge_gemma.kernels.compiler import ChunkFunction

_FEWEST = 6  # functions that are worth a process
_MOST = 200  # functions in a list: a byte for each
_began = threading.Lock()


class Needs(Protocol):
    """What needs kernels: a model."""

    def needed(self) -> Iterable[ChunkFunction]:
        """What it will compute with at first."""
        ...


opened: weakref.WeakSet[Needs] = weakref.WeakSet()
"""Models that may not have computed yet."""


def prepare() -> None:
    """Compile what is needed. Called when a function is about to be compiled; does nothing in the meantime."""
    if not _began.acquire(blocking=False):
        return
    try:
        functions = {function for model in list(opened) for function in model.needed()}
        opened.clear()
        missing = sorted((function for function in functions if not function.kept), key=_comes_later)[:_MOST]
        processes = min(cpus.available(), len(missing) // _FEWEST + 1)
        if processes > 1 and _can_fork():
            compiler.announce()
            with _children(missing, processes - 1) as following:
                for function in following:
                    _ = function.address
    finally:
        _began.release()


def _comes_later(function: ChunkFunction) -> tuple[bool, str]:
    """Those that are made for a model's choices are the large ones, and come first."""
    return " " not in function.name, function.name


def _can_fork() -> bool:
    return sys.platform == "linux" and threading.active_count() == 1 and compiler.keeps()


@contextlib.contextmanager
def _children(functions: list[ChunkFunction], processes: int) -> Iterator[Iterator[ChunkFunction]]:
    """Have so many children compile some of the functions, until each was taken once, and this process too: it takes
    the others. In the end all are compiled, unless a child was killed.
    """
    reads, writes = os.pipe()
    os.write(writes, bytes(range(len(functions))))
    os.close(writes)

    def following() -> Iterator[ChunkFunction]:
        while taken := os.read(reads, 1):
            yield functions[taken[0]]

    children = []
    try:
        for _ in range(processes):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which are those of libraries
                child = os.fork()
            if child == 0:
                _compile(following())
            children.append(child)
        yield following()
    finally:
        os.close(reads)
        for child in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def _compile(functions: Iterable[ChunkFunction]) -> None:
    """In a child, of which nothing is left afterwards but what it has kept on disk."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for function in functions:
            _ = function.address
    finally:
        os._exit(0)
