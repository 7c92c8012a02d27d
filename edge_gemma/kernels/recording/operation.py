"""One operation of a recorded program: a kernel cut into chunks for one or several tokens.

Owns: the layout of an operation, how compiled code reads it, and how a kernel describes its own (kernels/registry.py).
Does not know: any kernel, the order of operations, threads (program.py).

An operation is a row of int64 words: the address of its function, its chunks and window, the address of its token's
position, whether it waits, then its operands: the addresses of arrays, sizes, and float64 in the same bits. The
function is called with (address of the row, chunk). What differs from run to run, a position too, lies in arrays.
"""

from dataclasses import dataclass

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiler import ChunkFunction

FUNCTION, CHUNKS, WINDOW, POSITION, WAITS, OPERANDS = range(6)
"""Words of an operation. CHUNKS: how many chunks, or, where WINDOW is not -1, how many for each block of keys that the
token at the position sees (window 0: all keys; position -1: no token). WAITS: whether everything before must be
finished. OPERANDS: where its operands begin."""
WORDS = 20

ELEMENTS = 4096
"""Elements of a chunk of an elementwise operation."""
CHUNK_BYTES = 1 << 18
"""Weights of a chunk of a large product, which begins without prefetch: a quarter of it costs 8% of a token."""


class NotRecordableError(Exception):
    """What was called cannot be repeated as a program: arithmetic outside the kernels."""


@dataclass(frozen=True)
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


def one_row(rows: np.ndarray) -> None:
    """Raises NotRecordableError where there are more rows than one token's."""
    if len(rows) != 1:
        raise NotRecordableError(f"{len(rows)} rows")


def element_chunks(size: int) -> int:
    """Chunks of an elementwise operation on `size` elements."""
    return -(-size // ELEMENTS)


# --- for compiled code ------------------------------------------------------------------------------------------------


@intrinsic
def pointer(typing_context, address):
    """The address as a pointer."""

    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), emit


@numba.njit(error_model="numpy")
def position_of(row):
    """The position that an operation has. row: its address."""
    return numba.carray(pointer(numba.carray(pointer(row), WORDS, np.int64)[POSITION]), 1, np.int64)[0]


@numba.njit(error_model="numpy")
def operands(row):
    """The operands of an operation as integers and as floats. row: its address."""
    first = row + 8 * OPERANDS
    count = WORDS - OPERANDS
    return numba.carray(pointer(first), count, np.int64), numba.carray(pointer(first), count, np.float64)


@numba.njit(error_model="numpy")
def floats(address, shape):
    """The float32 array at an address."""
    return numba.carray(pointer(address), shape, np.float32)


@numba.njit(error_model="numpy")
def elements(chunk, size):
    """(begin, end) of a chunk's elements."""
    return chunk * ELEMENTS, min(size, (chunk + 1) * ELEMENTS)
