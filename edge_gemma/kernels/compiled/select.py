"""What numba compiles of a sampler's pass over the logits (kernels/select.py).

Owns: the chunk functions. Does not know: when they are called.
"""

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.gates import exp32
from edge_gemma.kernels.compiled.isa import F32, I32
from edge_gemma.kernels.compiled.operands import floats, operands
from edge_gemma.kernels.select import LOGITS_BLOCK

_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


@intrinsic
def _largest_of_block(typingctx, x, first):
    """The largest of a block from `first` on, NaN where one is. Compared as integers in the order of floats."""

    def codegen(context, builder, signature, args):
        b, wide = builder, isa.vector(I32, LOGITS_BLOCK)
        data = context.make_array(signature.args[0])(context, b, args[0]).data
        bits = isa.load(b, isa.at(b, data, I32, args[1]), wide)
        mask = isa.splat_constant(I32, LOGITS_BLOCK, _MAGNITUDE)
        magnitude = isa.call(b, f"llvm.vector.reduce.umax.v{LOGITS_BLOCK}i32", I32, b.and_(bits, mask))
        ordered = b.xor(bits, b.and_(b.ashr(bits, isa.splat_constant(I32, LOGITS_BLOCK, 31)), mask))
        top = isa.call(b, f"llvm.vector.reduce.smax.v{LOGITS_BLOCK}i32", I32, ordered)
        value = b.bitcast(b.xor(top, b.and_(b.ashr(top, I32(31)), I32(_MAGNITUDE))), F32)
        return b.select(b.icmp_unsigned("<=", magnitude, I32(_INFINITY)), value, F32(float("nan")))

    return types.float32(x, types.int64), codegen


def block_maxima(row, chunk):
    """x, out, n, blocks."""
    w, _ = operands(row)
    x, out = floats(w[0], w[2]), floats(w[1], w[3])
    whole = w[2] // LOGITS_BLOCK
    for block in range(whole):
        out[block] = _largest_of_block(x, block * LOGITS_BLOCK)
    if whole < w[3]:
        value = x[whole * LOGITS_BLOCK]
        for i in range(whole * LOGITS_BLOCK, w[2]):
            value = x[i] if x[i] > value or x[i] != x[i] else value
        out[whole] = value


@inner(fastmath={"contract", "reassoc"})
def _exp_sum(x, top, factor):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += exp32((x[i] - top) * factor)
    return total


def exp_sums(row, chunk):
    """x, out, n, blocks, top, factor."""
    w, f = operands(row)
    x, out = floats(w[0], w[2]), floats(w[1], w[3])
    for block in range(w[3]):
        here = x[block * LOGITS_BLOCK : min(w[2], (block + 1) * LOGITS_BLOCK)]
        out[block] = _exp_sum(here, np.float32(f[4]), np.float32(f[5]))
