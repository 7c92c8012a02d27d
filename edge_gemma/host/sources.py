"""Opens whatever can be given as a file of sound or pictures, as one file that can be read again from its start.

Owns: paths, pipes, bytes, open files (`opened`). Does not know: formats.
"""

import io
import os
import select
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edge_gemma.errors import EdgeGemmaError, UsageError

_PIPE_BYTES = 8 << 30  # bytes of a pipe, at most: they are kept on disk while they are read
_PIPE_S = 30  # seconds to wait for the first byte of a named pipe

Source = Path | str | bytes | IO[bytes]


@dataclass(frozen=True)
class Medium:
    """What a file should hold, for messages.

    name: of a file without a name. instead: what callers can give instead of a file. error: raised if the file cannot
    be read.
    """

    name: str
    instead: str
    error: type[EdgeGemmaError]


@dataclass(frozen=True)
class OpenedFile:
    """An open file. name: for messages. size: bytes. owned: it was opened here, and `close` closes it."""

    name: str
    file: Any
    size: int
    owned: bool

    def close(self) -> None:
        """Close the file, unless the caller opened it."""
        if self.owned:
            self.file.close()


def opened(source: Source, medium: Medium) -> OpenedFile:
    """Open a path (also of a pipe) or a file's bytes, or take a file that is open for reading bytes.

    A source that cannot be read twice is copied to a temporary file first. Raises the medium's error if it cannot be
    read or is empty, UsageError for anything that is no source.
    """
    if isinstance(source, (str, Path)):
        found = _opened_path(Path(source), medium)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        found = OpenedFile(medium.name, io.BytesIO(source), len(source), True)
    elif callable(getattr(source, "read", None)):
        found = _opened_file(source, medium)
    else:
        raise UsageError(
            f"{medium.name} is {type(source).__name__}, expected a path, a file's bytes, a file opened in binary mode, "
            f"or {medium.instead}"
        )
    if not found.size:
        found.close()
        raise medium.error(f"{found.name} is empty")
    return found


def _opened_path(path: Path, medium: Medium) -> OpenedFile:
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode):
            with _opened_pipe(path, medium) as pipe:
                return _kept(str(path), pipe, medium)
        if not stat.S_ISREG(mode):
            raise medium.error(f"{path} is not a file")
        file = path.open("rb")
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise medium.error(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return OpenedFile(str(path), file, os.fstat(file.fileno()).st_size, True)


def _opened_pipe(path: Path, medium: Medium) -> IO[bytes]:
    """Open a named pipe and wait until something is written into it. Raises the medium's error if nothing is."""
    pipe = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # without it, opening can wait for ever
    if not select.select([pipe], [], [], _PIPE_S)[0]:
        pipe.close()
        raise medium.error(f"{path} is not a file but a pipe, into which nothing was written for {_PIPE_S} s")
    os.set_blocking(pipe.fileno(), True)
    return pipe


def _opened_file(file: Any, medium: Medium) -> OpenedFile:
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) and name else medium.name
    try:
        if isinstance(file.read(0), str):
            raise UsageError(f"{name} is open for reading text, expected a file opened in binary mode")
        if not file.seekable():
            return _kept(name, file, medium)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    except (OSError, ValueError, AttributeError) as error:
        raise medium.error(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    return OpenedFile(name, file, size, False)


def _kept(name: str, pipe: Any, medium: Medium) -> OpenedFile:
    """Copy what comes out of a pipe to a temporary file without a name."""
    try:
        kept = tempfile.TemporaryFile()  # noqa: SIM115  (OpenedFile closes it)
    except OSError as error:
        raise medium.error(f"{name} comes from a pipe, which needs a temporary file: {error.strerror}") from None
    try:
        while kept.tell() <= _PIPE_BYTES and (data := pipe.read(1 << 20)):
            kept.write(data)
        size = kept.tell()
        if size > _PIPE_BYTES:
            raise medium.error(f"{name} sends more than {_PIPE_BYTES >> 30} GB: save it as a file first")
        kept.seek(0)
    except OSError as error:
        kept.close()
        raise medium.error(f"{name} comes from a pipe and cannot be kept in {tempfile.gettempdir()}: {error}") from None
    except BaseException:
        kept.close()
        raise
    return OpenedFile(name, kept, size, True)
