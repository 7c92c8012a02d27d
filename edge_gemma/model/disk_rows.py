"""Rows of the per-layer-embedding table, read from disk as tokens need them.

The table holds 2.35 of E2B's 4.63 billion text parameters and a token touches one row of 8,960, so it is never mapped
or loaded: a row is one `pread`. Owns: the open file and decoding. Does not know: what is done with the rows.
"""

import os
import weakref
from pathlib import Path

import numpy as np

from edge_gemma import kernels
from edge_gemma.errors import ModelFolderError, UsageError
from edge_gemma.folder.folder import Tensor
from edge_gemma.host import system
from edge_gemma.model.linear import widen


class DiskRows:
    """A row-major matrix on disk; `gather` is all there is. `close` closes its file, or the last reference's end."""

    def __init__(self, folder: Path, tensor: Tensor) -> None:
        self._tensor = tensor
        self._part = tensor.parts["records" if tensor.layout == "rows" else "values"]
        self._record = self._part.nbytes // tensor.shape[0]  # bytes
        self._path = folder / self._part.file
        try:
            self._fd = os.open(self._path, os.O_RDONLY | system.BINARY)
        except OSError as error:
            raise ModelFolderError(f"{self._path}: {error.strerror}") from None
        self._file = weakref.finalize(self, os.close, self._fd)
        system.advise(self._fd, "RANDOM")

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Rows ids [n] of the table: float32 [n, columns]. Raises ModelFolderError if the disk fails, UsageError if it
        was closed.
        """
        records = np.empty((len(ids), self._record), np.uint8)
        for record, offset in zip(records, self._offsets(ids), strict=True):
            self._read(record, offset)
        if self._tensor.layout == "dense":
            return widen(records.view(np.float32 if self._part.dtype == "F32" else np.uint16))
        rows = np.empty((len(ids), self._tensor.shape[1]), np.float32)
        kernels.dequantize_records(records, self._tensor.bits, self._tensor.group, rows)
        return rows

    def expect(self, ids: np.ndarray) -> None:
        """Let the disk fetch rows that `gather` will want, all at once and while other work goes on."""
        for offset in self._offsets(ids):
            system.advise(self._fd, "WILLNEED", offset, self._record)

    def _offsets(self, ids: np.ndarray) -> list[int]:
        if self._fd < 0:
            raise UsageError("the model was closed: load it again")
        return [self._part.offset + row * self._record for row in ids.tolist()]

    def _read(self, record: np.ndarray, offset: int) -> None:
        done = 0
        while done < len(record):
            try:
                got = system.read_at(self._fd, record[done:].data, offset + done)
            except OSError as error:
                raise ModelFolderError(f"{self._path}: reading a row failed: {error.strerror}") from None
            if got == 0:
                raise ModelFolderError(f"{self._path} ended at byte {offset + done}: it was cut while in use")
            done += got

    def close(self) -> None:
        self._fd = -1
        self._file()
