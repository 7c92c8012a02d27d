"""Compiling what is not kept: everything that the opened models need, by all cores at once.

A compiler in Python has one core, and takes 100 MB. So at the first function without machine code, everything that the
opened models need is listed, and processes (compiled/service.py) compile it, one a core. Functions that are asked for
later come one by one: the last process stays a while for them. Where no process can be started (a program that is one
file, an emulator), this one compiles, each function when it is first used.

Owns: who compiles what, and when. Does not know: models, how a function is compiled, where code is kept (kept.py).
"""

import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Iterable
from typing import Protocol

from edge_gemma.errors import KernelError
from edge_gemma.host import cpus, interrupts
from edge_gemma.host.pool import Pool
from edge_gemma.kernels import kept
from edge_gemma.kernels.compiled.service import CHANGED, NoService, Service
from edge_gemma.kernels.functions import ChunkFunction

_FEWEST = 6  # functions that are worth a process
_STAYS_S = 20.0  # a process without work


class Needs(Protocol):
    """What needs kernels: a model."""

    def needed(self) -> Iterable[ChunkFunction]:
        """What it will compute with at first."""
        ...


opened: weakref.WeakSet[Needs] = weakref.WeakSet()
"""Models that may not have computed yet."""

_made: dict[str, bytes] = {}  # machine code that could not be kept on disk, by its file


def compiled(function: ChunkFunction) -> bytes:
    """The machine code of a function that is not kept; what the opened models need is compiled with it.

    Raises KernelError for a function that cannot be compiled.
    """
    _prepare(function)
    code = _made.pop(function.file, None) or kept.read(function.file)
    return _alone(function) if code is None else code


def _prepare(first: ChunkFunction) -> None:
    """Compile what models need, if that is worth processes of its own."""
    models = list(opened)
    opened.clear()
    functions = {function for model in models for function in model.needed()} - {first}
    missing = [function for function in functions if not (function.kept or function.file in _made)]
    if len(missing) >= _FEWEST:
        compile_all([first, *missing], min(cpus.available(), len(missing) // _FEWEST + 1))


def _comes_later(function: ChunkFunction) -> tuple[bool, str]:
    """Those that are made for a model's choices are the large ones, and come first."""
    return not function.choices, function.name


def _together(functions: Iterable[ChunkFunction], processes: int) -> None:
    """Compile functions by so many processes, each of which takes the next one. What they leave is not compiled.

    Raises KernelError for a function that cannot be compiled.
    """
    waiting: queue.SimpleQueue[ChunkFunction] = queue.SimpleQueue()
    for function in functions:
        waiting.put(function)
    services: list[Service] = []
    over = threading.Event()

    def work() -> None:
        with contextlib.suppress(queue.Empty, NoService):
            services.append(service := Service())
            while not over.is_set():
                function = waiting.get_nowait()
                _keep(function, service.compile(function))

    with Pool(processes) as pool:
        try:
            for done in [pool.submit(work) for _ in range(processes)]:
                done.result()
        finally:  # by Ctrl-C too, which is for this process alone
            over.set()
            for service in services:
                service.close()


def compile_all(functions: Iterable[ChunkFunction], processes: int) -> None:
    """Compile what is not kept. Raises KernelError for a function that cannot be compiled."""
    missing = sorted((function for function in functions if not function.kept), key=_comes_later)
    if missing:
        _together(missing, processes)


def _keep(function: ChunkFunction, code: bytes) -> None:
    if not kept.keep(function.file, code):
        _made[function.file] = code


class _Lingering:
    """A process for functions that come one by one. It ends when none came for a while."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._service: Service | None = None
        self._end: threading.Timer | None = None

    def compile(self, function: ChunkFunction) -> bytes:
        """As Service.compile."""
        with self._one_at_a_time:
            if self._end is not None:
                self._end.cancel()
            try:
                self._service = self._service or Service()
                code = self._service.compile(function)
            except BaseException:
                self._close()
                raise
            self._end = threading.Timer(_STAYS_S, self.close)
            self._end.daemon = True
            self._end.start()
            return code

    def close(self) -> None:
        """End the process."""
        with self._one_at_a_time:
            self._close()

    def _close(self) -> None:
        if self._service is not None:
            self._service.close()
            self._service = None


_lingering = _Lingering()


def _alone(function: ChunkFunction) -> bytes:
    try:
        code = _lingering.compile(function)
    except NoService:
        return _here(function)
    kept.keep(function.file, code)
    return code


def _here(function: ChunkFunction) -> bytes:
    """Compile in this process. Code that is for this very processor alone is not kept."""
    from edge_gemma.kernels.compiled import compiler

    if not kept.unchanged(function.module):
        raise KernelError(CHANGED)
    with interrupts.held():
        code = compiler.machine_code(function.module, function.function, function.choices)
        if compiler.for_this_target():
            kept.keep(function.file, code)
    return code


@atexit.register
def _close() -> None:
    _lingering.close()


def _after_fork() -> None:
    """In the child. The process that compiles answers its parent."""
    global _lingering
    _lingering = _Lingering()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
