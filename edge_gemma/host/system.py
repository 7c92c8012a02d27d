"""System calls on files that some platforms and file systems lack, and their replacements.

Owns: reading and writing at an offset, mapping a file, flushing, locks, swapping two names, advice about reading, and
asking for memory beforehand. Does not know: what files hold.

Reading and writing at an offset have a replacement. The other calls are optional: without them nothing is done.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import threading
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BINARY = getattr(os, "O_BINARY", 0)  # a flag of os.open that only Windows has: do not translate line ends
# The errors of a failing or full disk. Any other error of a flush means that the file system has no flushing.
_DISK_FAULTS = {errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_position = threading.Lock()  # guards the files' positions where reading at an offset has to move them


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer`, or its beginning, from `offset` of a file. Returns the bytes read, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def read(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset` of a file, fewer at its end."""
    data, done = bytearray(length), 0
    while got := read_at(fd, memoryview(data)[done:], offset + done):
        done += got
    return bytes(data[:done])


def write_at(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write `data`, or its beginning, at `offset` of a file. Returns the bytes written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _position:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def allocated(path: Path) -> int:
    """The bytes that a file takes on the disk: less than its size if it has holes. Its size if this is not known."""
    status = path.stat()
    return 512 * status.st_blocks if hasattr(status, "st_blocks") else status.st_size


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file read-only. Raises OSError.

    Some file systems (9p, FUSE) allow only private maps, which are the same to a reader.
    """
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:
            if not hasattr(mmap, "MAP_PRIVATE"):
                raise
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def need_memory(nbytes: int) -> None:
    """Raises MemoryError if this process cannot have so many more bytes. For calls of libraries that crash instead.

    Only addresses are reserved, which `ulimit -v` and strict accounting refuse. No page is touched.
    """
    try:
        mmap.mmap(-1, nbytes).close()
    except OSError:
        raise MemoryError from None


def flush(fd: int) -> None:
    """Flush a file to the disk, if the file system can. Raises OSError if the disk fails or is full."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno in _DISK_FAULTS:
            raise


def flush_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, if the system can. Raises OSError if the disk fails or is full."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(PermissionError):  # a folder that can be written but not read
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flush(fd)
        finally:
            os.close(fd)


def lock_folder(path: Path) -> int | None:
    """Lock a folder until the returned descriptor is closed or the process ends. None on a system without locks.

    Raises BlockingIOError while another process holds the lock.
    """
    if fcntl is None:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:  # CIFS, NFS, FUSE
        os.close(fd)
        return None
    return fd


def lock_file(path: Path) -> int | None:
    """Create a file and lock it until the returned descriptor is closed or the process ends.

    None while another process holds the lock. The file stays; on a system without locks nothing is locked.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:  # CIFS, NFS, FUSE
            return fd
    return fd


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step. Returns False if the system cannot (Linux `renameat2`, RENAME_EXCHANGE, can)."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def advise(fd: int, advice: str, offset: int = 0, length: int = 0) -> None:
    """Tell the system how a part of a file will be read. advice: "RANDOM", "WILLNEED" or "DONTNEED" of posix_fadvise.

    length: bytes from `offset`; 0 for all of the rest.
    """
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, length, getattr(os, f"POSIX_FADV_{advice}"))


def read_in_order(mapped: mmap.mmap) -> None:
    """Read a mapped file into memory from start to end, in large pages if the system has them for files.

    Every token reads all weights, so no byte is read needlessly. A file that is read in order gets 2 MB pages (Linux
    6.16 on ext4, and others). Decoding from these is 9% faster than from the 4 kB pages of random faults
    (docs/LOG.md#small-pages). Pages in memory already are only mapped, in milliseconds. A system without these calls
    reads on demand.
    """
    if sys.platform != "linux":
        return
    populate_read = 22  # MADV_POPULATE_READ, Linux 5.14
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), populate_read):
        if advice is not None:
            with contextlib.suppress(OSError):
                mapped.madvise(advice)


def drop_pages(mapped: mmap.mmap) -> None:
    """Let go of the memory of a file that was mapped for reading: what is read again comes from the system's cache."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
