"""Where machine code is kept: with the package, and in the user's cache.

Owns: the two places, names and checks of files, removing what nobody uses. Does not know: how code is made
(compiled/), or put into memory (machine_code.py).

A file is named after what its content was made from: the function's name and choices, the sources of its module and of
all that it imports, and the processor (targets.py). So an edited source never meets old code. A file begins with a
digest of its content: processes may share a folder, and a damaged file is made again.

The package may bring files of its own ("shipped/<processor>/", made by `python -m edge_gemma.kernels.shipping`). The
cache is a folder named after a digest of all kernels' sources and of the compiler's versions. Every process that reads
from it touches it once. Whoever makes a new one removes those of other sources that nobody touched for _KEEP_DAYS.
"""

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from edge_gemma.host import places
from edge_gemma.kernels import sources, targets

__all__ = ["cache_directory", "cache_note", "set_cache_root"]

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "shipped"
_cache_root: Path | None = None
_unwritable = False
_KEEP_DAYS = 14
_FOLDER_NAME = re.compile(r"[0-9a-f]{24}")
_DIGEST = 32  # bytes
_PACKAGE = __name__.split(".")[0]


def _compiler() -> str:
    """The versions of what compiles, without loading it."""
    result = ""
    for name in ("numba", "llvmlite"):
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            with contextlib.suppress(OSError):
                result += (Path(folder) / "_version.py").read_text()
    return result


@functools.cache
def _folder_name() -> str:
    """Changes whenever machine code of the kernels in this package could be stale."""
    root = Path(__file__).parent
    paths = (path.relative_to(root).with_suffix("") for path in (root / "compiled").rglob("*.py"))
    modules = (".".join([__package__, *path.parts]) for path in paths if path.stem != "__init__")
    return hashlib.sha256(f"{_compiler()} {sources.digest(modules)}".encode()).hexdigest()[:24]


@functools.cache
def sources_of(module: str) -> str:
    """A digest of what a module below this package is made from, as it was when it was first asked for."""
    return sources.digest([f"{_PACKAGE}.{module}"])


def cache_directory() -> Path | None:
    """Where this user's machine code is kept. It need not exist. None: the user has no place for it."""
    if _cache_root:
        return _cache_root / _folder_name()
    cache = places.cache()
    return cache and cache / "kernels" / _folder_name()


def set_cache_root(root: Path | None) -> None:
    """Keep machine code below `root` from now on (None: the user's cache)."""
    global _cache_root, _unwritable
    _cache_root, _unwritable = root, False


def cache_note() -> str | None:
    """One line for the user when machine code cannot be kept, else None."""
    if not _unwritable:
        return None
    folder = cache_directory()
    why = f"{folder} is not writable" if folder else "there is no home folder to keep them in"
    return f"kernels are compiled at every start: {why}; {places.CACHE_VARIABLE} may name another folder"


def unchanged(module: str) -> bool:
    """Whether a module's sources are still what they were then: not edited or upgraded under a running process."""
    return sources.digest([f"{_PACKAGE}.{module}"]) == sources_of(module)


def file_name(module: str, name: str, key: str, kind: str = "code") -> str:
    """The file of what is made from a module, for this machine's processor. name: for people; key: all choices."""
    text = repr((kind, module, sources_of(module), key, targets.host().name))
    return f"{re.sub(r'[^A-Za-z0-9]', '_', name)}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.{kind}"


def has(name: str) -> bool:
    """Whether there is such a file, whole or not."""
    return any((folder / name).exists() for folder in _folders())


def read(name: str) -> bytes | None:
    """What is kept under a name; None where nothing is, or something damaged."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            data = (folder / name).read_bytes()
            if folder != _shipped():
                _touch(folder)
            if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
                return data[_DIGEST:]
    return None


def keep(name: str, data: bytes) -> bool:
    """Keep data under a name in the cache. Returns False where that is not possible."""
    global _unwritable
    folder = cache_directory()
    try:
        if folder is None:
            raise FileNotFoundError
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            prune(folder.parent)
        write(folder / name, data)
        return True
    except OSError:
        if not _unwritable:
            _unwritable = True
            log.warning("%s", cache_note())
        return False


def write(path: Path, data: bytes) -> None:
    """Write data and their digest beside `path`, and rename them there."""
    handle, temporary = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def prune(root: Path) -> None:
    """Remove folders of machine code below `root` that nobody used for _KEEP_DAYS. Others may do the same meanwhile:
    what is gone is gone, and a process whose folder was removed compiles what it still lacks.
    """
    oldest = time.time() - _KEEP_DAYS * 86400
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            ours = folder.name == _folder_name() or not _FOLDER_NAME.fullmatch(folder.name)
            if not ours and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def _shipped() -> Path:
    return SHIPPED / targets.host().name


def _folders() -> Iterator[Path]:
    """Where files may be. Whoever finds all in the first need not know the cache, whose name takes reading sources."""
    yield _shipped()
    if (folder := cache_directory()) is not None:
        yield folder


@functools.cache
def _touch(folder: Path) -> None:
    """Say that a folder is in use, once a process."""
    with contextlib.suppress(OSError):
        os.utime(folder)
