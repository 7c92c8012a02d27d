"""How compiled code reads an operation (recording/operation.py).

Owns: an operation's operands and position, as arrays and numbers. Does not know: any kernel.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.recording.operation import ELEMENTS, OPERANDS, POSITION, WORDS


@intrinsic
def pointer(typing_context, address):
    """The address as a pointer."""

    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), emit


@inner()
def position_of(row):
    """The position that an operation has. row: its address."""
    return numba.carray(pointer(numba.carray(pointer(row), WORDS, np.int64)[POSITION]), 1, np.int64)[0]


@inner()
def operands(row):
    """The operands of an operation as integers and as floats. row: its address."""
    first = row + 8 * OPERANDS
    count = WORDS - OPERANDS
    return numba.carray(pointer(first), count, np.int64), numba.carray(pointer(first), count, np.float64)


@inner()
def floats(address, shape):
    """The float32 array at an address."""
    return numba.carray(pointer(address), shape, np.float32)


@inner()
def part(chunk, together, size):
    """(begin, end) of what a chunk takes of `size` things, so many together."""
    return chunk * together, min(size, (chunk + 1) * together)


@inner()
def elements(chunk, size):
    """(begin, end) of a chunk's elements."""
    return part(chunk, ELEMENTS, size)
