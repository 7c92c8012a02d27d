"""Writing so that an interruption leaves the old or the new, never half: aside, fsync, rename.

Owns: one file (`write_file`) and one folder (`new_folder`). Does not know what is written.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edge_gemma.errors import UsageError

_ASIDE, _REPLACED = ".partial", ".replaced"


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    fd, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_ASIDE, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def scratch_folder(
    dest: Path, key: str | None = None, keep_on: type[BaseException] = KeyboardInterrupt
) -> Iterator[Path]:
    """A folder beside `dest` that is gone afterwards.

    Scratch folders that earlier, killed runs left for the same `dest` are removed first: they are told from those of
    live runs by the lock a live run holds. With a `key`, Ctrl-C (or what else `keep_on` names) leaves the folder too,
    and who comes with the same key is given what an interrupted run had in it. Raises UsageError while another has that
    folder.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    kept = dest.with_name(f".{dest.name}.{key}{_ASIDE}") if key else None
    _clear_leftovers(dest, kept)
    if kept:
        kept.mkdir(0o700, exist_ok=True)
    scratch = kept or Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=_ASIDE, dir=dest.parent))
    lock = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    keep = False
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            keep = True
            raise UsageError(f"{dest} is being written by another run: wait for it, or choose another name") from None
        yield scratch
    except keep_on:
        keep = kept is not None
        raise
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def new_folder(
    dest: Path, *, force: bool = False, key: str | None = None, keep_on: type[BaseException] = KeyboardInterrupt
) -> Iterator[Path]:
    """Fill a folder aside; on a normal exit it takes `dest`'s name, on any other it is gone.

    With `force`, an existing folder at `dest` is replaced after the new one is whole. key: of what the folder is made;
    an interrupted run with the same key is resumed. keep_on: what counts as an interruption.
    Raises UsageError if `dest` exists without `force`, is not a folder, or is being written with this key.
    """
    dest = dest.absolute()
    with scratch_folder(dest, key, keep_on) as aside:
        if dest.exists() and (not force or not dest.is_dir()):
            raise UsageError(f"{dest} exists already: choose another name, or --force to replace a model folder")
        yield aside
        folders = [aside]
        for path in aside.rglob("*"):
            if path.is_dir():
                folders.append(path)
                continue
            with path.open("rb") as file:
                os.fsync(file.fileno())
                # what was written piece by piece lies in the cache in small pages: the first to read it gets large ones
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for folder in reversed(folders):
            sync_folder(folder)
        _rename(aside, dest)


def left_aside(dest: Path) -> list[Path]:
    """What interrupted runs have left for the next one that writes `dest`."""
    return [path for path in dest.absolute().parent.glob(f".{dest.name}.*{_ASIDE}") if path.is_dir()]


def _rename(aside: Path, dest: Path) -> None:
    aside.chmod(0o755)
    if not dest.exists():
        os.rename(aside, dest)
    elif not _exchange(aside, dest):  # after an exchange the old folder lies aside, and goes with the scratch folder
        old = dest.with_name(f".{dest.name}{_REPLACED}")
        os.rename(dest, old)
        os.rename(aside, dest)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(dest.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, where the system and the file system can (Linux `renameat2`, RENAME_EXCHANGE)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def _clear_leftovers(dest: Path, kept: Path | None = None) -> None:
    """Remove what killed runs left, not `kept`; give a folder its name back where one died between two renames."""
    old = dest.with_name(f".{dest.name}{_REPLACED}")
    if old.exists() and not dest.exists():
        os.rename(old, dest)
    for left in [*left_aside(dest), old]:
        if left == kept or not left.is_dir():
            continue
        fd = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # another export is writing there now
        finally:
            os.close(fd)
