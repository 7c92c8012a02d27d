"""Compiling kernels, and keeping the machine code on disk.

Owns: chunk functions and the `compiled` decorator (numba, compiled at the first call), the on-disk cache, and the
number of threads a call uses. Does not know: what any kernel computes, the threads themselves (workers.py).

This is the one door to numba's internals. What is taken for granted about them, each with a test of its own in
tests/kernels/test_compiler.py; pyproject.toml admits no numba that was not tested:
1. FunctionIdentity._unique_ids numbers functions, and the number is part of a compiled function's symbol.
2. caching._Cache is an interface of six members. A dispatcher and a CFunc ask the one in `_cache` before they compile,
   and hand it what they compiled.
3. A CompileResult is pickled by serialize.dumps(_reduce()) and made again by _rebuild. It says in `lifted` and
   `library.has_dynamic_globals` what must not be kept.
4. CFunc(function, (arguments, result), locals, options) compiles at compile(); before, its address is None.
5. dispatcher.compile(signature), then disable_compile(): other arguments raise TypeError and compile nothing.
6. A read-only array type takes writeable arrays as well, without a second compilation.
7. codegen().magic_tuple() is (target triple, CPU name, "+feature,-feature,...").

The cache is a folder of the user's cache, named after a digest of the kernels' sources (sources.py), the numba and
llvmlite versions and Python's: an edited intrinsic never meets old code (numba's own cache would not notice). One file
a compiled function, named after its key, its signature, its own module's sources and the CPU with its features, written
beside and renamed, begun with a digest of its content: processes may share the folder, and a damaged file is compiled
again. numba's index files are not used: two processes writing one can leave an entry that points at another function's
code.

A folder is touched once by every process that loads code from it. Whoever makes a new one removes those of other
sources that nobody touched for _KEEP_DAYS.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import pickle
import re
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import llvmlite
import numba
import numpy as np
from numba.core import compiler, serialize, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import _Cache
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target

from edge_gemma.errors import UsageError
from edge_gemma.host import cpus, interrupts, places
from edge_gemma.kernels import sources

__all__ = [
    "announce_compiling", "cache_directory", "cache_note", "checked_threads", "set_cache_root", "set_threads",
    "threads", "use_threads",
]  # fmt: skip

log = logging.getLogger(__name__)


def _number_functions() -> None:
    """Number them from a random start, in a forked child too.

    numba numbers functions from 1 in every process, and the number is all that tells the symbols of two closures of one
    name apart. Cached code of two processes meets in a third, where the linker takes whichever symbol came first.
    (Seen: a kernel for scales a group that ran the code for scales a token; attention that ran another tile's.)
    """
    FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60))


_number_functions()

CHUNK_ARGUMENTS = (types.int64, types.int64)
_caller = threading.local()  # .limit: what `use_threads` asks for here
_announce: Callable[[], object] | None = None
before_compiling: Callable[[], object] | None = None  # called when a chunk function is not on disk (preparing.py)
_compiling = threading.RLock()  # a function is compiled once
_threads: int | None = None
_cache_root: Path | None = None
_KEEP_DAYS = 14
_FOLDER_NAME = re.compile(r"[0-9a-f]{24}")
_unwritable = False


def _kernel_sources() -> str:
    """Changes whenever machine code of the kernels in this package could be stale."""
    versions = f"{numba.__version__} {llvmlite.__version__} {np.__version__} {sys.version}"
    root = Path(__file__).parent
    paths = (path.relative_to(root).with_suffix("") for path in root.rglob("*.py") if path.stem != "__init__")
    modules = (".".join([__package__, *path.parts]) for path in paths)
    return hashlib.sha256(f"{versions} {sources.digest(modules)}".encode()).hexdigest()[:24]


_SOURCES = _kernel_sources()  # of the sources this process runs, as they were when it imported them


@functools.cache
def _sources_at_import(module: str) -> str:
    return sources.digest([module])


def cache_directory() -> Path | None:
    """Where compiled kernels are kept. It need not exist. None: the user has no place for them."""
    if _cache_root:
        return _cache_root / _SOURCES
    cache = places.cache()
    return cache and cache / "kernels" / _SOURCES


def set_cache_root(root: Path | None) -> None:
    """Keep compiled kernels below `root` from now on (None: the user's cache)."""
    global _cache_root, _unwritable
    _cache_root, _unwritable = root, False


def announce_compiling(announce: Callable[[], object] | None) -> None:
    """Call `announce` whenever a kernel is about to be compiled because the cache does not have it (None: nothing)."""
    global _announce
    _announce = announce


def announce() -> None:
    """Say that something is about to be compiled."""
    if _announce is not None:
        _announce()


def keeps() -> bool:
    """Whether compiled kernels are kept on disk, as far as is known."""
    return cache_directory() is not None and not _unwritable


def cache_note() -> str | None:
    """One line for the user when compiled kernels cannot be kept, else None."""
    if not _unwritable:
        return None
    folder = cache_directory()
    why = f"{folder} is not writable" if folder else "there is no home folder to keep them in"
    return f"kernels are compiled at every start: {why}; {places.CACHE_VARIABLE} may name another folder"


class _KernelCache(_Cache):
    """numba's cache interface over one digest-checked file a compiled function."""

    def __init__(self, py_func, key):
        self._name = re.sub(r"\W", "_", key or py_func.__name__)
        self._module = py_func.__module__
        self._sources = _sources_at_import(self._module)
        self._key = f"{self._module} {self._sources} {key or self._name}"
        self._enabled = True

    @property
    def cache_path(self):
        return str(cache_directory() or "")

    def enable(self):
        self._enabled = True

    def disable(self):
        self._enabled = False

    def flush(self):
        folder = cache_directory()
        for path in folder.glob(f"{self._name}-*.bin") if folder else ():
            path.unlink(missing_ok=True)

    def _path(self, sig, codegen) -> Path:
        """Raises FileNotFoundError where there is no cache."""
        folder, key = cache_directory(), repr((self._key, sig, codegen.magic_tuple()))
        if folder is None:
            raise FileNotFoundError
        return folder / f"{self._name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"

    def has(self, sig) -> bool:
        """Whether there is a file, whole or not."""
        with contextlib.suppress(OSError):
            return self._path(sig, cpu_target.target_context.codegen()).exists()
        return False

    def load_overload(self, sig, target_context):
        if not self._enabled:
            return None
        target_context.refresh()
        try:
            path = self._path(sig, target_context.codegen())
            data = path.read_bytes()
            _touch(path.parent)
            digest, body = data[:32], data[32:]
            if hashlib.sha256(body).digest() != digest:
                return None
            return compiler.CompileResult._rebuild(target_context, *pickle.loads(body))
        except OSError:
            announce()
            return None

    def save_overload(self, sig, data):
        global _unwritable
        if not self._enabled or data.lifted or data.library.has_dynamic_globals:
            return
        if sources.digest([self._module]) != self._sources:  # edited or upgraded under a running process
            return
        try:
            path = self._path(sig, data.codegen)
            body = serialize.dumps(data._reduce())
            if not path.parent.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                prune(path.parent.parent)
            _replace(path, hashlib.sha256(body).digest() + body)
        except OSError:
            if not _unwritable:
                _unwritable = True
                log.warning("%s", cache_note())


@functools.cache
def _touch(folder: Path) -> None:
    """Say that a folder is in use, once a process."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def prune(root: Path) -> None:
    """Remove folders of kernels below `root` that nobody used for _KEEP_DAYS. Others may do the same meanwhile: what
    is gone is gone, and a process whose folder was removed compiles what it still lacks.
    """
    oldest = time.time() - _KEEP_DAYS * 86400
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            if folder.name != _SOURCES and _FOLDER_NAME.fullmatch(folder.name) and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _replace(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename it there."""
    handle, temporary = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def target(context) -> tuple[str, str, str]:
    """What code is compiled for: the target triple, the CPU's name, and its features as "+avx2,-sse4a,..."."""
    return context.codegen().magic_tuple()


def host_cpu() -> tuple[str, set[str]]:
    """This machine's CPU as LLVM names it, and the features it has."""
    _, cpu, features = target(cpu_target.target_context)
    return cpu, {feature[1:] for feature in features.split(",") if feature.startswith("+")}


def array(dtype, axes: int, written: bool = False) -> types.Array:
    """The numba type of a C-contiguous array argument. Arrays that are only read may be writeable or not."""
    return types.Array(numba.from_dtype(np.dtype(dtype)), axes, "C", readonly=not written)


def compiled(*signature, fastmath=False, key=None):
    """Decorator: a function compiled for one signature, at its first launch or from the cache. It releases the GIL, and
    knows no threads: it is for work that threads share out among themselves.

    It returns False for shapes that do not fit each other, before touching anything, and else True. `key` names the
    choices a closure was made with: functions of one module with the same key are the same code.
    """

    def decorate(function):
        dispatcher = numba.njit(fastmath=fastmath, nogil=True, error_model="numpy")(function)
        dispatcher._cache = _KernelCache(function, key)
        dispatcher.kernel_signature = signature
        return dispatcher

    return decorate


def inner(**options):
    """Decorator: a function for use inside others alone. numba would make entrances from Python and C, which take it a
    tenth of the time.
    """
    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True} | options
    return lambda function: numba.njit(**options)(function)


class ChunkFunction:
    """A C function void(int64, int64), compiled when its address is first asked for.

    What operations are made of (recording/operation.py): it gets an operation's address and a chunk's number.
    """

    def __init__(self, function, key: str) -> None:
        self._compiled = CFunc(function, (CHUNK_ARGUMENTS, types.void), {}, {"error_model": "numpy"})
        self._compiled._cache = self._cache = _KernelCache(function, key)
        self.name = key

    @property
    def kept(self) -> bool:
        """Whether it is compiled, or on disk."""
        return self._compiled.address is not None or self._cache.has(self._compiled._sig)

    @functools.cached_property
    def address(self) -> int:
        if before_compiling is not None and not self.kept:
            before_compiling()
        with _compiling, interrupts.held():
            if self._compiled.address is None:
                self._compiled.compile()
        return self._compiled.address


def chunk_function(key: str):
    """Decorator: a ChunkFunction. `key` as in `compiled`; it begins with a name, and behind that has the choices."""
    return lambda function: ChunkFunction(function, key)


def make_ready(dispatcher) -> None:
    """Compile what `compiled` returned, or load it, if it was not used yet."""
    with _compiling:
        if not dispatcher.overloads:
            with interrupts.held():
                dispatcher.compile(dispatcher.kernel_signature)
            dispatcher.disable_compile()


def launch(dispatcher, *args) -> bool:
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


def checked_threads(threads: int | None) -> int | None:
    """`threads`, None for the default. Raises UsageError for a number that this machine does not have."""
    most = numba.config.NUMBA_NUM_THREADS
    if threads is not None and not 1 <= threads <= most:
        raise UsageError(f"{threads} threads, expected 1 to {most} on this machine")
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
    return min(numba.config.NUMBA_NUM_THREADS, cpus.available())
