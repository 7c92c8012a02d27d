"""What a sampler asks of 262,144 logits: where the largest are, and what exp of all of them sums to.

Owns: one pass over the logits, a number a block. Does not know: how a token is chosen (sampler.py). One thread: a pass
takes less time than waking the others.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import isa
from edge_gemma.kernels.compiler import array, kernel
from edge_gemma.kernels.elementwise import exp32
from edge_gemma.kernels.isa import F32, I32

BLOCK = 128
"""Logits of a block."""
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


@intrinsic
def _largest_of_block(typingctx, x, first):
    """The largest of BLOCK values from `first` on, NaN where one is. Compared as integers in the order of floats."""

    def codegen(context, builder, signature, args):
        b, wide = builder, isa.vector(I32, BLOCK)
        data = context.make_array(signature.args[0])(context, b, args[0]).data
        bits = isa.load(b, isa.at(b, data, I32, args[1]), wide)
        mask = isa.splat_constant(I32, BLOCK, _MAGNITUDE)
        magnitude = isa.call(b, f"llvm.vector.reduce.umax.v{BLOCK}i32", I32, b.and_(bits, mask))
        ordered = b.xor(bits, b.and_(b.ashr(bits, isa.splat_constant(I32, BLOCK, 31)), mask))
        top = isa.call(b, f"llvm.vector.reduce.smax.v{BLOCK}i32", I32, ordered)
        value = b.bitcast(b.xor(top, b.and_(b.ashr(top, I32(31)), I32(_MAGNITUDE))), F32)
        return b.select(b.icmp_unsigned("<=", magnitude, I32(_INFINITY)), value, F32(float("nan")))

    return types.float32(x, types.int64), codegen


@numba.njit(error_model="numpy")
def _fits(x, out):
    return out.shape[0] == (x.shape[0] + BLOCK - 1) // BLOCK


@kernel(array("f4", 1), array("f4", 1, True))
def block_maxima(x, out):
    if not _fits(x, out):
        return False
    whole = x.shape[0] // BLOCK
    for block in range(whole):
        out[block] = _largest_of_block(x, block * BLOCK)
    if whole < out.shape[0]:
        value = x[whole * BLOCK]
        for i in range(whole * BLOCK, x.shape[0]):
            value = x[i] if x[i] > value or x[i] != x[i] else value
        out[whole] = value
    return True


@kernel(array("f4", 1), types.float32, types.float32, array("f4", 1, True), fastmath={"contract", "reassoc"})
def exp_sums(x, top, factor, out):
    if not _fits(x, out):
        return False
    for block in range(out.shape[0]):
        total = np.float32(0)
        for i in range(block * BLOCK, min(x.shape[0], (block + 1) * BLOCK)):
            total += exp32((x[i] - top) * factor)
        out[block] = total
    return True
