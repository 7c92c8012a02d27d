"""One operation: a kernel's work cut into chunks that any thread may do.

Owns: the layout of an operation, how a kernel describes its own (kernels/registry.py). Does not know: any kernel, how
compiled code reads it (compiled/operands.py), the order of operations (program.py), threads (workers.py).

An operation is a row of int64 words: the address of its function, its chunks and window, the address of its token's
position, whether it waits, then its operands: the addresses of arrays, sizes, and float64 in the same bits. The
function is called with (address of the row, chunk). What differs from run to run, a position too, lies in arrays.
"""

import ctypes
import struct
from dataclasses import dataclass

import numpy as np

from edge_gemma.kernels.functions import ChunkFunction

FUNCTION, CHUNKS, WINDOW, POSITION, WAITS, OPERANDS = range(6)
"""Words of an operation. CHUNKS: how many chunks, or, where WINDOW is not -1, how many for each block of keys that the
token at the position sees (window 0: all keys; position -1: no token). WAITS: whether everything before must be
finished. OPERANDS: where its operands begin."""
WORDS = 20
BLOCK = 128
"""Keys of a block of attention."""

ELEMENTS = 4096
"""Elements of a chunk of an elementwise operation."""
CHUNK_BYTES = 1 << 18
"""Weights of a chunk of a large product, which begins without prefetch: a quarter of it costs 8% of a token."""


@dataclass(slots=True)
class Operation:
    """An operation before it is laid out."""

    function: ChunkFunction
    operands: tuple[object, ...]  # arrays (their addresses), None (0), int, float (its bits)
    reads: tuple[np.ndarray, ...]
    writes: tuple[np.ndarray, ...]
    chunks: int = 1
    window: int = -1
    position: np.ndarray | None = None  # int64 [1], of the token whose keys are meant
    appends: tuple[np.ndarray, ...] = ()  # written where no other operation that appends to them writes

    def lay_out(self, rows: np.ndarray, i: int, waits: bool) -> None:
        """Write the operation into rows[i], int64 [WORDS]."""
        words = [self.function.address, self.chunks, self.window, _word(self.position), waits]
        words += map(_word, self.operands)
        _PACK[len(words)](rows, 8 * WORDS * i, *words)


_PACK = [struct.Struct(f"{length}q").pack_into for length in range(WORDS + 1)]
_BITS = struct.Struct("q").unpack, struct.Struct("d").pack
_HEAD = object.__basicsize__


def address(array: np.ndarray) -> int:
    """Where an array's data lie. `array.ctypes.data` says so too, in a microsecond.

    NumPy's structure of an array begins with the pointer (ndarraytypes.h, PyArrayObject_fields).
    """
    return ctypes.c_int64.from_address(id(array) + _HEAD).value


def _word(value: object) -> int:
    if isinstance(value, np.ndarray):
        return address(value)
    if isinstance(value, float):
        return _BITS[0](_BITS[1](value))[0]
    return 0 if value is None else value  # type: ignore[return-value]


def element_chunks(size: int) -> int:
    """Chunks of an elementwise operation on `size` elements."""
    return -(-size // ELEMENTS)


def rows_together(width: int) -> int:
    """Rows of a chunk of an operation that takes rows of so many elements."""
    return max(1, ELEMENTS // max(width, 1))
