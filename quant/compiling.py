"""Compiled functions over NumPy arrays for the exporter: numba's dispatchers, kept on disk.

Owns: the decorator `compiled`, calling what it makes, its files. Does not know: what a function computes.

The kernels of a model are compiled otherwise (edge_gemma/kernels/compiled/): a process that runs one needs no numba.
What is taken for granted about numba, each with a test of its own in tests/quant/test_compiling.py:
1. FunctionIdentity._unique_ids numbers functions, and the number is part of a compiled function's symbol.
2. caching._Cache is an interface of six members. A dispatcher asks the one in `_cache` before it compiles, and hands it
   what it compiled.
3. A CompileResult is pickled by serialize.dumps(_reduce()) and made again by _rebuild. It says in `lifted` and
   `library.has_dynamic_globals` what must not be kept.
4. dispatcher.compile(signature), then disable_compile(): other arguments raise TypeError and compile nothing.
5. A read-only array type takes writeable arrays as well, without a second compilation.

numba's own cache would not notice an edited module that a function's module imports, and two processes that write its
index can leave an entry that points at another function's code.
"""

import itertools
import os
import pickle
import secrets
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core import compiler, serialize, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import _Cache

from edge_gemma.host import interrupts
from edge_gemma.kernels import functions, kept

_compiling = threading.RLock()  # a function is compiled once


def _number_functions() -> None:
    """Number them from a random start, in a forked child too.

    numba numbers functions from 1 in every process, and the number is all that tells the symbols of two closures of one
    name apart. Cached code of two processes meets in a third, where the linker takes whichever symbol came first.
    """
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))


_number_functions()


class _KernelCache(_Cache):
    """numba's cache interface over one digest-checked file a compiled function (kernels/kept.py)."""

    def __init__(self, py_func: Callable[..., object]) -> None:
        self._module = py_func.__module__.partition(".")[2]
        self._name = py_func.__name__
        kept.sources_of(self._module)  # as they are now

    @property
    def cache_path(self) -> str:
        return str(kept.cache_directory() or "")

    def enable(self) -> None: ...

    def disable(self) -> None: ...

    def flush(self) -> None: ...

    def _file(self, sig: object, codegen: Any) -> str:
        key = repr((self._name, sig, codegen.magic_tuple()))
        return kept.file_name(self._module, self._name, key, "numba")

    def load_overload(self, sig: object, target_context: Any) -> Any:
        target_context.refresh()
        body = kept.read(self._file(sig, target_context.codegen()))
        if body is None:
            functions.announce()
            return None
        return compiler.CompileResult._rebuild(target_context, *pickle.loads(body))

    def save_overload(self, sig: object, data: Any) -> None:
        if not (data.lifted or data.library.has_dynamic_globals) and kept.unchanged(self._module):
            kept.keep(self._file(sig, data.codegen), serialize.dumps(data._reduce()))


def array(dtype: Any, axes: int, written: bool = False) -> types.Array:
    """The numba type of a C-contiguous array argument. Arrays that are only read may be writeable or not."""
    return types.Array(numba.from_dtype(np.dtype(dtype)), axes, "C", readonly=not written)


def compiled(*signature: Any, fastmath: Any = False) -> Callable[[Callable[..., object]], Any]:
    """Decorator: a function compiled for one signature, at its first launch or from the cache. It releases the GIL, and
    knows no threads: it is for work that threads share out among themselves.

    It returns False for shapes that do not fit each other, before touching anything, and else True.
    """

    def decorate(function: Callable[..., object]) -> Any:
        dispatcher: Any = numba.njit(fastmath=fastmath, nogil=True, error_model="numpy")(function)
        dispatcher._cache = _KernelCache(function)
        dispatcher.kernel_signature = signature
        return dispatcher

    return decorate


def make_ready(dispatcher: Any) -> None:
    """Compile what `compiled` returned, or load it, if it was not used yet."""
    with _compiling:
        if not dispatcher.overloads:
            with interrupts.held():
                dispatcher.compile(dispatcher.kernel_signature)
            dispatcher.disable_compile()


def launch(dispatcher: Any, *args: object) -> bool:
    """Call what `compiled` returned. False: the arguments do not fit."""
    make_ready(dispatcher)
    try:
        return dispatcher(*args)
    except TypeError:  # another dtype, number of axes or memory order
        return False


def _after_fork() -> None:
    """In the child. Its parent's other threads are gone, and with them whoever holds the lock."""
    global _compiling
    _compiling = threading.RLock()
    _number_functions()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
