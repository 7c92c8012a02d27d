"""What numba compiles of products with matrices in bfloat16 or float32.

Owns: the dot product, tiles of rows and tokens. Does not know: how a product is cut into chunks
(kernels/matrix/floats.py), packed weights. A result does not depend on how many rows of x are computed at once: every
product is summed in the lanes of one vector, which are then folded in a fixed order. Rows of a length that fills no
whole vectors take a plain loop.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic, overload

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.attend.ir import fold
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import float_of_bits
from edge_gemma.kernels.compiled.isa import (
    F32,
    I16,
    I32,
    I64,
    at,
    load,
    loop,
    multiply_add,
    splat_constant,
    store,
    vector,
)
from edge_gemma.kernels.compiled.operands import floats, operands, pointer
from edge_gemma.kernels.matrix.floats import ROWS


def _widen(w):
    """float32 of a float32, or of bfloat16 bits (uint16)."""
    raise NotImplementedError("inside kernels only")


@overload(_widen)
def _overload_widen(w):
    if w == types.uint16:
        return lambda w: float_of_bits(np.int32(w) << np.int32(16))
    return lambda w: w


@inner(fastmath={"contract", "reassoc", "nsz"})
def dot(x, w):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * _widen(w[i])
    return total


def _make_tile(variant, half, tokens):
    """tile(x, w, out, token, row): ROWS rows of w from `row` on for `tokens` rows of x; whole vectors of k only."""
    lanes = isa.SETS[variant].float_lanes
    scalar = I16 if half else F32

    def codegen(context, builder, signature, args):
        b = builder
        x, w, out = (context.make_array(signature.args[i])(context, b, args[i]) for i in range(3))
        k, width = b.extract_value(x.shape, 1), b.extract_value(out.shape, 1)
        xs = [at(b, x.data, F32, b.mul(b.add(args[3], I64(t)), k)) for t in range(tokens)]
        ws = [at(b, w.data, scalar, b.mul(b.add(args[4], I64(r)), k)) for r in range(ROWS)]

        def step(index, sums):
            here, result = b.mul(index, I64(lanes)), []
            weights = [load(b, at(b, p, scalar, here), vector(scalar, lanes)) for p in ws]
            if half:
                wide = vector(I32, lanes)
                weights = [b.shl(b.zext(v, wide), splat_constant(I32, lanes, 16)) for v in weights]
                weights = [b.bitcast(v, vector(F32, lanes)) for v in weights]
            for p in xs:
                value = load(b, at(b, p, F32, here), vector(F32, lanes))
                result += [multiply_add(b, value, v, sums[len(result) + r]) for r, v in enumerate(weights)]
            return result

        zero = splat_constant(F32, lanes, 0.0)
        sums = loop(b, b.udiv(k, I64(lanes)), [zero] * (tokens * ROWS), step)
        for t in range(tokens):
            place = b.add(b.mul(b.add(args[3], I64(t)), width), args[4])
            store(b, fold(b, sums[t * ROWS : (t + 1) * ROWS]), at(b, out.data, F32, place))
        return context.get_dummy_value()

    @intrinsic
    def tile(typingctx, x, w, out, token, row):
        return types.none(x, w, out, types.int64, types.int64), codegen

    return tile


def _make_rows(variant, half):
    """rows(x, w, out, begin, end): out[:, begin:end] = x w[begin:end]^T."""
    chosen = isa.SETS[variant]
    lanes, tokens = chosen.float_lanes, chosen.float_sums // ROWS
    one, many = _make_tile(variant, half, 1), _make_tile(variant, half, tokens)

    @inner()
    def rows(x, w, out, begin, end):
        n, k = x.shape
        if k == 0 or k % lanes or w.shape[0] < ROWS:
            for r in range(begin, end):
                for i in range(n):
                    out[i, r] = dot(x[i], w[r])
            return
        for row in range(begin, end, ROWS):
            r = min(row, w.shape[0] - ROWS)  # the last tile ends with the last row and repeats what came before
            for first in range(0, n, tokens):
                if n >= tokens:
                    many(x, w, out, min(first, n - tokens), r)
                else:
                    for i in range(n):
                        one(x, w, out, i, r)

    return rows


def dense(variant, half):
    """x, w, out, rows, k, rows a chunk, n."""
    dtype = np.uint16 if half else np.float32
    rows = _make_rows(variant, half)

    def dense(row, chunk):
        w, _ = operands(row)
        matrix = numba.carray(pointer(w[1]), (w[3], w[4]), dtype)
        x, out = floats(w[0], (w[6], w[4])), floats(w[2], (w[6], w[3]))
        rows(x, matrix, out, chunk * w[5], min(w[3], (chunk + 1) * w[5]))

    return dense
