"""Reading rows of tensors out of large files that are not trusted.

Owns: opening a folder's regular files, reads that fail in one line, the table of tensors a decoder needs against the
tensors a source has, and blocks of rows as float32. Does not know: any container format, nor what a tensor is for.

Files are read with `pread`, never mapped: mapped pages count as resident memory, and a row block of a 4.7 GB tensor
must cost the memory of that block.
"""

import math
import os
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.config import GemmaConfig
from edge_gemma.errors import CheckpointError, ConfigError
from edge_gemma.export.element_types import ElementType, dequantize_into
from edge_gemma.host import system

_COMPARED = 1 << 20  # bytes compared at a time
_CHUNK_VALUES = 1 << 19  # values converted at a time: 2 MiB of float32, which stays in the cache


class GlanceError(CheckpointError):
    """The first rows of `matrix` promised what later ones do not hold."""

    def __init__(self, matrix: str, finding: str) -> None:
        super().__init__(f"{matrix} {finding}, or changed while it was read")
        self.matrix = matrix


@dataclass(frozen=True)
class TensorInfo:
    """What a checkpoint says of one tensor: canonical name, shape (rows first), storage type ("BF16", "Q4_K", ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def show(text: object, limit: int = 80) -> str:
    """Text from a file, fit for a one-line message: control characters and lone surrogates escaped, long text cut."""
    s = str(text)
    s = s if len(s) <= limit else s[: limit - 3] + "..."
    return s if s.isprintable() else ascii(s)[1:-1]


def few(names: Iterable[object], most: int = 3) -> str:
    """The first names and how many more there are."""
    shown = list(names)
    rest = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(show(n, 160) for n in shown[:most]) + rest


_MAX_POINTER = 1024  # bytes; a pointer has about 130
_POINTER = b"version https://git-lfs.github.com/spec/"


class SourceFile:
    """A regular file opened once. Raises CheckpointError for everything that goes wrong with it.

    elsewhere: reading costs a transfer, so nobody reads more than is needed.
    """

    elsewhere = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = show(path, 200)
        self._fd = -1
        try:
            # Not blocking, so that a pipe or a device in place of a file is refused instead of waited for.
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | system.BINARY)
        except (OSError, ValueError) as e:
            raise CheckpointError(f"cannot read {self.name}: {getattr(e, 'strerror', None) or e}") from e
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise CheckpointError(f"{self.name} is not a regular file")
        self._fd = fd
        self.size = status.st_size
        if self.size <= _MAX_POINTER and self.read(0, self.size).startswith(_POINTER):
            self.close()
            raise CheckpointError(
                f"{self.name} is a Git LFS pointer, which stands for a file that was not fetched: run `git lfs pull` "
                "where it lies, or download the file itself"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; the range is checked before anything is allocated."""
        self._check(offset, length)
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` (contiguous bytes) from `offset`."""
        self._check(offset, len(buffer))
        done = 0
        while done < len(buffer):
            try:
                got = system.read_at(self._fd, buffer[done : done + (1 << 30)], offset + done)
            except OSError as e:
                raise CheckpointError(f"cannot read {self.name}: {e.strerror}") from e
            if not got:
                raise CheckpointError(f"{self.name} became shorter while it was read; export again from a whole file")
            done += got

    def _check(self, offset: int, length: int) -> None:
        if self._fd < 0:
            raise CheckpointError(f"{self.name} was closed before it was read")
        if not 0 <= offset <= offset + length <= self.size:
            raise CheckpointError(
                f"{self.name} is truncated: {length} bytes at {offset} are needed, the file has {self.size}"
            )

    def prefetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Small ranges (offset, length) are read soon, one by one. Nothing to do for a file that lies here."""

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SourceFolder:
    """The files of a checkpoint, by name. A folder that lies elsewhere offers the same (export/remote.py)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = show(path, 200)

    def has(self, name: str) -> bool:
        return (self._path / name).exists()

    def open(self, name: str) -> SourceFile:
        """Raises CheckpointError where it cannot be read."""
        return SourceFile(self._path / name)

    def read(self, name: str, limit: int) -> bytes:
        """A whole side file (config.json and the like) of at most `limit` bytes. Raises CheckpointError."""
        file = self.open(name)
        try:
            if file.size > limit:
                raise CheckpointError(f"{file.name} has {file.size} bytes, expected at most {limit}")
            return file.read(0, file.size)
        finally:
            file.close()


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: row-major, whole blocks, `offset` from the start of the file."""

    file: SourceFile
    offset: int
    shape: tuple[int, ...]
    dtype: str  # the container's word
    kind: ElementType | None  # None: a type that cannot be read
    nbytes: int


def read_rows(tensor: StoredTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Rows [start, stop) of the first axis as a fresh C-contiguous float32 array; only their bytes are read."""
    kind, rows = tensor.kind, tensor.shape[0]
    if kind is None or not 0 <= start <= stop <= rows:
        raise CheckpointError(f"rows {start} to {stop} of a {tensor.dtype} tensor of {rows} rows cannot be read")
    row = math.prod(tensor.shape[1:])
    first = start * row // kind.block_elements
    last = -(-stop * row // kind.block_elements)
    values = np.empty((last - first, kind.block_elements), np.float32)
    step = max(1, _CHUNK_VALUES // kind.block_elements)
    raw = np.empty((min(step, last - first), kind.block_bytes), np.uint8)
    for at in range(first, last, step):
        blocks = raw[: min(step, last - at)]
        tensor.file.read_into(tensor.offset + at * kind.block_bytes, blocks.reshape(-1).data)
        dequantize_into(kind, blocks, values[at - first : at - first + len(blocks)])
    skip = start * row - first * kind.block_elements  # only vectors of block types start inside a block
    return values.reshape(-1)[skip : skip + (stop - start) * row].reshape(stop - start, *tensor.shape[1:])


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are stored alike, byte for byte; the first difference ends the reading.

    Of files that lie elsewhere the first and the last of their bytes are compared.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    starts = [0, max(0, a.nbytes - _COMPARED)] if a.file.elsewhere else range(0, a.nbytes, _COMPARED)
    steps = ((at, min(_COMPARED, a.nbytes - at)) for at in starts)
    return all(a.file.read(a.offset + at, n) == b.file.read(b.offset + at, n) for at, n in steps)


def resolve_config(source: str, text_config: Mapping[str, Any], ignored: Collection[str] = ()) -> GemmaConfig:
    """`GemmaConfig.from_text_config`, its error told in one line that names the source."""
    try:
        return GemmaConfig.from_text_config(text_config, ignored)
    except ConfigError as e:
        raise ConfigError(show(f"{source}: {e}", 600)) from e


def bind_tensors(
    source: str,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    unused: Callable[[str], bool],
    original: Callable[[str], str] = str,
) -> dict[str, StoredTensor]:
    """The tensors of `stored` that `expected` asks for, checked. Keys of both are canonical names.

    `unused(name)` says which others may be present; `original(name)` spells a name as the file does, for messages.
    Raises CheckpointError naming unknown, missing, misshapen and unreadable tensors.
    """

    def fail(what: str, names: list[str]) -> None:
        if names:
            raise CheckpointError(f"{source}: {len(names)} {what}: {few(names)}")

    fail("unknown tensors", [original(n) for n in stored if n not in expected and not unused(n)])
    fail("tensors are missing", [original(n) for n in expected if n not in stored])
    bound = {n: stored[n] for n in expected}
    fail(
        "tensors of the wrong shape",
        [f"{original(n)} is {t.shape}, expected {expected[n]}" for n, t in bound.items() if t.shape != expected[n]],
    )
    fail("tensors of unsupported types", [f"{original(n)} is {t.dtype}" for n, t in bound.items() if t.kind is None])
    return bound
