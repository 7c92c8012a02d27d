"""Chunk functions: the compiled functions that operations are made of, put into memory when they are first needed.

    scale = chunk_function("kernels.compiled.gates", "scale")
    matmul = chunk_function("kernels.compiled.matrix.decode", "matmul", "avx2", 4, 32)

Owns: naming a function, finding its machine code, compiling where there is none. Does not know: how (preparing.py,
compiled/), what any of them computes.
"""

import functools
import logging
import os
import threading
from collections.abc import Callable

from edge_gemma.kernels import kept, machine_code

__all__ = ["announce_compiling"]

log = logging.getLogger(__name__)

Choice = str | int | bool

_announce: Callable[[], object] | None = None
_loading = threading.RLock()  # a function is compiled once
compile_with: "Callable[[ChunkFunction], bytes] | None" = None
"""Compiles what is not kept, and others that will be needed (preparing.py)."""


def announce_compiling(announce: Callable[[], object] | None) -> None:
    """Call `announce` whenever a kernel is about to be compiled, for there is no machine code of it (None: nothing)."""
    global _announce
    _announce = announce


def announce() -> None:
    """Say that something is about to be compiled."""
    if _announce is not None:
        _announce()


class ChunkFunction:
    """A C function void(int64, int64): it gets an operation's address (recording/operation.py) and a chunk's number."""

    def __init__(self, module: str, name: str, choices: tuple[Choice, ...]) -> None:
        """module: below this package; name: a function there, which gets the choices and makes this one."""
        self.module, self.function, self.choices = module, name, choices
        self.name = " ".join([name, *map(str, choices)])

    @property
    def file(self) -> str:
        """The name of its machine code's file (kept.py)."""
        return kept.file_name(self.module, self.name, self.name)

    @property
    def kept(self) -> bool:
        """Whether it is in memory, or on disk."""
        return "address" in self.__dict__ or kept.has(self.file)

    @functools.cached_property
    def address(self) -> int:
        """Where it is in memory."""
        with _loading:
            if "address" in self.__dict__:  # another thread was first
                return self.__dict__["address"]
            code = kept.read(self.file)
            if code is None:
                announce()
                assert compile_with is not None
                code = compile_with(self)
            return _in_memory(code)


def _in_memory(code: bytes) -> int:
    try:
        return machine_code.load(code)
    except machine_code.Unreadable as error:  # another LLVM may write what that reader does not know
        log.warning("%s: LLVM loads it", error)
        return machine_code.by_llvm(code)


@functools.cache
def chunk_function(module: str, name: str, *choices: Choice) -> ChunkFunction:
    """The chunk function that a module of this package makes under a name, for these choices."""
    return ChunkFunction(module, name, choices)


def _after_fork() -> None:
    """In the child. Its parent's other threads are gone, and with them whoever holds the lock."""
    global _loading
    _loading = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
