"""Atomic writing: after an interruption the old file or folder is there, or the new one, never half of it.

Something new is written beside its destination, flushed to the disk, and renamed.

Owns: one file (`write_file`, `new_file`) and one folder (`new_folder`). Does not know what is written.

Links are followed: the file that a link names is replaced. A file that is replaced keeps its permissions; a new one
gets those of the umask.
"""

import contextlib
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from edge_gemma.errors import UsageError
from edge_gemma.host import system

_ASIDE, _REPLACED = ".partial", ".replaced"
_TRIES = 20  # to lock a folder that other runs take for a leftover
_ABANDONED_S = 86_400.0  # without locks: what nobody wrote to for so long belongs to a run that is gone
_SHOWN = 40  # characters of a file's name in that of the file aside, which must not be too long


def sync_tree(folder: Path) -> None:
    """Flush everything in a folder to the disk."""
    folders = [folder]
    for path in folder.rglob("*"):
        if path.is_dir():
            folders.append(path)
            continue
        with path.open("r+b") as file:
            system.flush(file.fileno())
            # what was written piece by piece lies in the cache in small pages: the first to read it gets large ones
            system.advise(file.fileno(), "DONTNEED")
    for path in reversed(folders):
        system.flush_folder(path)


def write_file(path: Path, data: bytes, *, permissions: int | None = None) -> None:
    """Write `data` to `path`, whole or not at all. Devices and pipes are written to directly. Raises OSError.

    permissions: as in `new_file`.
    """
    with new_file(path, permissions=permissions) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path, *, permissions: int | None = None) -> Iterator[IO[bytes]]:
    """Write a file piece by piece: it is at `path` once all was written, or not at all. As `write_file`.

    permissions: of the file; None for those of the file before, or of the umask.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG | 0o666
    if not stat.S_ISREG(mode):
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name[:_SHOWN]}.{secrets.token_hex(4)}{_ASIDE}")
    try:
        fd = os.open(
            aside,
            os.O_WRONLY | os.O_CREAT | os.O_EXCL | system.BINARY,
            stat.S_IMODE(mode) if permissions is None else permissions,
        )
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            system.flush(file.fileno())
        if permissions is None:
            _take_permissions(path, aside)
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        if isinstance(error, OSError):
            error.filename, error.filename2 = os.fspath(path), None
        raise
    system.flush_folder(path.parent)


def _take_permissions(old: Path, new: Path) -> None:
    """Copy the permissions of `old`, where there is one and the file system has permissions."""
    with contextlib.suppress(OSError):
        os.chmod(new, stat.S_IMODE(os.stat(old).st_mode))


@contextlib.contextmanager
def scratch_folder(
    dest: Path, key: str | None = None, keep_on: type[BaseException] = KeyboardInterrupt
) -> Iterator[Path]:
    """A folder beside `dest` that is removed afterwards.

    Scratch folders that killed runs left for the same `dest` are removed first. A live run holds a lock on its own,
    which tells the two apart. With a `key`, Ctrl-C (or whatever exception `keep_on` names) keeps the folder, and the
    next run with the same key gets it with its contents. Raises UsageError while another run has that folder.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    kept = dest.with_name(f".{dest.name}.{key}{_ASIDE}") if key else None
    _clear_leftovers(dest, kept)
    scratch, lock = _locked(dest, kept)
    keep = False
    try:
        yield scratch
    except keep_on:
        keep = kept is not None and any(kept.iterdir())
        raise
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _locked(dest: Path, kept: Path | None) -> tuple[Path, int | None]:
    """The folder `kept`, or a new one, and its lock. Raises UsageError while another run has `kept`.

    Another run that begins at the same moment may take it for a leftover before it is locked, and remove it: then
    there is another try.
    """
    for _ in range(_TRIES):
        scratch = kept or dest.with_name(f".{dest.name}.{secrets.token_hex(4)}{_ASIDE}")
        scratch.mkdir(exist_ok=kept is not None)
        try:
            lock = system.lock_folder(scratch)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            if kept is None:
                continue
            break
        if lock is None or _is_at(lock, scratch):
            return scratch, lock
        os.close(lock)
    raise UsageError(f"{dest} is being written by another run: wait for it, or choose another name")


def _is_at(fd: int, path: Path) -> bool:
    """Whether an open folder still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_folder(
    dest: Path,
    *,
    force: bool = False,
    having: Collection[str] = (),
    key: str | None = None,
    keep_on: type[BaseException] = KeyboardInterrupt,
) -> Iterator[Path]:
    """Fill a folder beside `dest`. A normal exit renames it to `dest`; any other removes it.

    force: replace an existing folder at `dest`, once the new one is whole. having: names of files; a folder that is
    replaced must have one of them, or be empty. key: identifies what the folder is made of; an interrupted run with the
    same key is resumed. keep_on: the exceptions that count as an interruption. Raises UsageError if `dest` exists
    without `force`, if it must not be replaced, or while another run writes it with this key.
    """
    dest = _real(dest)
    with scratch_folder(dest, key, keep_on) as aside:
        _refuse_to_replace(dest, force, having)
        yield aside
        sync_tree(aside)
        _refuse_to_replace(dest, force, having)  # another run may have ended first
        _rename(aside, dest)


def left_aside(dest: Path) -> list[Path]:
    """The folders that interrupted runs have left beside `dest` for the next run."""
    dest = _real(dest)
    pattern = f".{glob.escape(dest.name)}.*{_ASIDE}"
    found = [path for path in dest.parent.glob(pattern) if path.is_dir() and not path.is_symlink()]
    # a dot more: it was left for another folder, dest.something
    return [path for path in found if "." not in path.name[len(dest.name) + 2 : -len(_ASIDE)]]


def _real(dest: Path) -> Path:
    """The path with every link followed."""
    return Path(os.path.realpath(dest))


@contextlib.contextmanager
def unused(aside: Path) -> Iterator[None]:
    """Hold a folder that an interrupted run has left. Raises UsageError while a run is writing there."""
    try:
        lock = system.lock_folder(aside)
    except BlockingIOError:
        raise UsageError(f"{aside} is being written by another run: wait for it, or end it first") from None
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _refuse_to_replace(dest: Path, force: bool, having: Collection[str]) -> None:
    """Raises UsageError for a folder that must stay: without `force` any, with it one that has none of the files
    `having`.
    """
    if not os.path.lexists(dest):
        return
    if not force:
        raise UsageError(f"{dest} exists already: choose another name, or --force to replace a model folder")
    if not dest.is_dir():
        raise UsageError(f"{dest} is no folder, --force replaces nothing else: choose another name")
    if having and any(dest.iterdir()) and not any((dest / name).is_file() for name in having):
        raise UsageError(f"{dest} has none of {', '.join(having)}: --force replaces models only, choose another name")


def _rename(aside: Path, dest: Path) -> None:
    _take_permissions(dest, aside)
    if not dest.exists():
        os.rename(aside, dest)
    elif not system.exchange(aside, dest):  # after an exchange the old folder lies aside, and goes with the scratch one
        old = dest.with_name(f".{dest.name}{_REPLACED}")
        os.rename(dest, old)
        os.rename(aside, dest)
        shutil.rmtree(old, ignore_errors=True)
    system.flush_folder(dest.parent)


def _clear_leftovers(dest: Path, kept: Path | None = None) -> None:
    """Remove what killed runs left, except `kept`. Restores a folder's name if a run died between the two renames."""
    old = dest.with_name(f".{dest.name}{_REPLACED}")
    if old.exists() and not dest.exists():
        with contextlib.suppress(FileNotFoundError):  # another run has
            os.rename(old, dest)
    for left in [*left_aside(dest), old]:
        if left == kept or not left.is_dir():
            continue
        try:
            lock = system.lock_folder(left)
        except (BlockingIOError, FileNotFoundError):
            continue  # another run is writing there now, or has removed it
        if lock is not None or _last_written(left) < time.time() - _ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _last_written(folder: Path) -> float:
    """When the folder was last written, in seconds since 1970."""
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            times.append(path.stat().st_mtime)
    return max(times)
