"""Computed prefixes on disk: one file a run of tokens, with their keys and values.

Owns: names, checksums, how much room the files take. Does not know: which tokens follow which (model/prefix_cache.py),
what keys and values are.

A file is a safetensors container that is written aside and renamed. Its metadata has a CRC-32 of each tensor, so that
rows which are not needed need not be read. Several processes may share a folder: who finds a file damaged, or gone,
computes its tokens again. The oldest files go when there is no room.
"""

import contextlib
import logging
import os
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_gemma.folder.atomic import write_file

log = logging.getLogger(__name__)

FORMAT = "edge-gemma prefix 1"
SUFFIX = ".safetensors"
_TOKENS = "tokens"
_ABANDONED_S = 86_400.0  # what is still aside then belongs to a process that is gone


class LostFileError(Exception):
    """A file is gone or damaged: compute its tokens again."""


@dataclass(frozen=True)
class PrefixFile:
    """One file. prefix: the digest of the tokens before. tokens: int64 [n]."""

    path: Path
    prefix: bytes
    tokens: np.ndarray

    def rows(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Tensors, each [n, ...]. Raises LostFileError if one is not what was written."""
        with _reading(self.path) as file:
            checksums = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in names}
        if any(checksums.get(name) != _checksum(rows) or len(rows) != len(self.tokens) for name, rows in found.items()):
            raise LostFileError(f"{self.path} is damaged")
        return found


class PrefixFiles:
    """The files of one model, in a folder of its own below one that all models share. Neither need exist."""

    def __init__(self, root: Path, model: str, most_bytes: int) -> None:
        """most_bytes: of all models' files together."""
        self.folder = root / model
        self._root, self._most = root, most_bytes

    def found(self) -> list[PrefixFile]:
        """Every file that can be used. What is damaged or foreign is left alone, and said once."""
        files, strange = [], 0
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                if path.name.startswith("."):  # being written
                    continue
                try:
                    files.append(_opened(path))
                except LostFileError:
                    strange += 1
        if strange:
            log.warning("%s: %d files are damaged or none of ours, they are not used", self.folder, strange)
        return files

    def write(self, prefix: bytes, tokens: np.ndarray, rows: dict[str, np.ndarray]) -> PrefixFile:
        """Keep the rows of some tokens. Raises OSError where that cannot be done."""
        from safetensors.numpy import save

        tensors = {_TOKENS: np.ascontiguousarray(tokens), **{k: np.ascontiguousarray(v) for k, v in rows.items()}}
        metadata = {name: _checksum(tensor) for name, tensor in tensors.items()}
        data = save(tensors, metadata | {"format": FORMAT, "prefix": prefix.hex()})
        if len(data) > self._most:
            raise OSError(f"{len(data)} bytes, the cache holds {self._most}")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{prefix.hex()}-{metadata[_TOKENS]}{SUFFIX}"
        self._make_room(len(data))
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.unlink()  # it would be written to what it names, or a pipe would be waited for
        write_file(path, data)
        with contextlib.suppress(OSError):
            path.chmod(0o600)
        return PrefixFile(path, prefix, tokens)

    def touch(self, file: PrefixFile) -> None:
        """It was used just now."""
        with contextlib.suppress(OSError):
            os.utime(file.path)

    def remove(self, file: PrefixFile) -> None:
        """It is of no use."""
        with contextlib.suppress(OSError):
            file.path.unlink()

    def _make_room(self, size: int) -> None:
        """Remove the files that were not used for longest until `size` bytes more fit. Others may do so meanwhile."""
        known, now = [], time.time()
        for path in self._root.glob("*/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                if not path.name.startswith("."):
                    known.append((status.st_mtime, status.st_size, path))
                elif now - status.st_mtime > _ABANDONED_S:
                    path.unlink()
        total = sum(bytes_ for _, bytes_, _ in known) + size
        for _, bytes_, path in sorted(known):
            if total <= self._most:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= bytes_


def _opened(path: Path) -> PrefixFile:
    """Raises LostFileError for what is no prefix file."""
    with _reading(path) as file:
        metadata: dict[str, Any] = file.metadata() or {}
        tokens = file.get_tensor(_TOKENS) if metadata.get("format") == FORMAT else None
        prefix = bytes.fromhex(metadata.get("prefix", ""))
    if tokens is None or tokens.dtype != np.int64 or tokens.ndim != 1 or not len(tokens):
        raise LostFileError(f"{path} is no prefix file")
    if metadata.get(_TOKENS) != _checksum(tokens):
        raise LostFileError(f"{path} is damaged")
    return PrefixFile(path, prefix, tokens)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The container of a regular file: a pipe would be waited for. Raises LostFileError, also for what goes wrong."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise LostFileError(f"{path} is no file")
    try:
        with safe_open(str(path), "np") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise LostFileError(f"{path}: {error}") from None


def _checksum(tensor: np.ndarray) -> str:
    return f"{zlib.crc32(tensor.tobytes()):08x}"
