"""What a sampler asks of 262,144 logits: where the largest are, and what exp of all of them sums to.

Owns: one pass over the logits, a number a block. Does not know: how a token is chosen (sampler.py). One thread: a pass
takes less time than waking the others.
"""

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import isa
from edge_gemma.kernels.compiler import chunk_function, inner
from edge_gemma.kernels.gates import exp32
from edge_gemma.kernels.isa import F32, I32
from edge_gemma.kernels.recording.operation import Operation, floats, operands
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["LOGITS_BLOCK", "block_maxima", "exp_sums"]

LOGITS_BLOCK = 128
"""Logits that are taken together."""
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


def _blocks(x):
    return -(-len(x) // LOGITS_BLOCK)


@chunk_function("block_maxima")
def _block_maxima_chunk(row, chunk):
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


def _block_maxima(_, x, out):
    return (
        [Operation(_block_maxima_chunk, (x, out, len(x), len(out)), (x,), (out,))] if len(out) == _blocks(x) else None
    )


@kernel("x float32 [n]; out float32 [blocks of 128]", _block_maxima)
def block_maxima(x: Array, out: Array) -> None:
    """out[b] = the largest of x[128 b : 128 (b + 1)], NaN where one of these is NaN; the last block may be shorter."""
    for b in range(len(out)):
        out[b] = x[b * LOGITS_BLOCK : (b + 1) * LOGITS_BLOCK].max()


@inner(fastmath={"contract", "reassoc"})
def _exp_sum(x, top, factor):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += exp32((x[i] - top) * factor)
    return total


@chunk_function("exp_sums")
def _exp_sums_chunk(row, chunk):
    """x, out, n, blocks, top, factor."""
    w, f = operands(row)
    x, out = floats(w[0], w[2]), floats(w[1], w[3])
    for block in range(w[3]):
        here = x[block * LOGITS_BLOCK : min(w[2], (block + 1) * LOGITS_BLOCK)]
        out[block] = _exp_sum(here, np.float32(f[4]), np.float32(f[5]))


def _exp_sums(_, x, top, factor, out):
    operand = x, out, len(x), len(out), float(top), float(factor)
    return [Operation(_exp_sums_chunk, operand, (x,), (out,))] if len(out) == _blocks(x) else None


@kernel("x float32 [n]; out float32 [blocks of 128]", _exp_sums)
def exp_sums(x: Array, top: float, factor: float, out: Array) -> None:
    """out[b] = sum of exp((x - top) factor) over x[128 b : 128 (b + 1)]; the last block may be shorter."""
    for b in range(len(out)):
        block = x[b * LOGITS_BLOCK : (b + 1) * LOGITS_BLOCK].astype(np.float64)
        out[b] = np.exp((block - top) * factor).sum()
