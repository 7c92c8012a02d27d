"""What numba compiles of activations as 8-bit integers (kernels/quantize.py).

Owns: their chunk functions. Does not know: when they are called, the weights that the integers will meet.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import fill, float_of_bits
from edge_gemma.kernels.compiled.operands import floats, operands, part, pointer
from edge_gemma.kernels.quantize import SMALLEST

_INFINITY_BITS = np.int32(0x7F800000)


# --- quantize_activations ---------------------------------------------------------------------------------------------


@inner(fastmath={"contract"})
def _quantize_block(x, q):
    """One scale's worth of a row, k <= q.shape[0] values; returns the scale. q beyond k becomes 0."""
    k = x.shape[0]
    bits = x.view(np.int32)
    top = np.int32(0)
    for i in range(k):
        top = max(top, bits[i] & np.int32(0x7FFFFFFF))
    amax = float_of_bits(top)
    finite = top < _INFINITY_BITS
    usable = finite and amax >= SMALLEST
    inverse = np.float32(127) / amax if usable else np.float32(0)
    if usable:
        for i in range(k):
            q[i] = np.int8(min(max(np.rint(x[i] * inverse), np.float32(-127)), np.float32(127)))
        fill(q[k:], 0)
    else:
        fill(q, 0)
    if usable:
        return amax / np.float32(127)
    return np.float32(0) if finite else np.float32(np.nan)


def _make_quantize_group(width):
    """quantize_group(x, q, scale, sums, g): _quantize_block of `width` values, all within x, and their sum."""
    wide, floats = isa.vector(isa.I32, width), isa.vector(isa.F32, width)

    def codegen(context, builder, signature, args):
        b = builder
        x, q, scale, sums = (
            context.make_array(t)(context, b, a) for t, a in zip(signature.args[:4], args, strict=False)
        )
        first = b.mul(args[4], isa.I64(width))
        values = isa.load(b, isa.at(b, x.data, isa.F32, first), floats)
        bits = b.and_(b.bitcast(values, wide), isa.splat_constant(isa.I32, width, 0x7FFFFFFF))
        top = isa.call(b, f"llvm.vector.reduce.umax.v{width}i32", isa.I32, bits)
        amax = b.bitcast(top, isa.F32)
        finite = b.icmp_unsigned("<", top, isa.I32(int(_INFINITY_BITS)))
        usable = b.and_(finite, b.fcmp_ordered(">=", amax, isa.F32(float(SMALLEST))))
        zero = isa.splat_constant(isa.F32, width, 0.0)
        inverse = b.select(usable, b.fdiv(isa.F32(127.0), amax), isa.F32(0.0))
        values = b.select(isa.splat(b, finite, width), values, zero)
        steps = b.fmul(values, isa.splat(b, inverse, width))
        for name, end in (("rint", None), ("maxnum", -127.0), ("minnum", 127.0)):
            ends = () if end is None else (isa.splat_constant(isa.F32, width, end),)
            steps = isa.call(b, f"llvm.{name}.v{width}f32", floats, steps, *ends)
        steps = b.fptosi(steps, wide)
        isa.store(b, b.trunc(steps, isa.vector(isa.I8, width)), isa.at(b, q.data, isa.I8, first))
        damaged = b.select(finite, isa.F32(0.0), isa.F32(float("nan")))
        isa.store(b, b.select(usable, b.fdiv(amax, isa.F32(127.0)), damaged), isa.at(b, scale.data, isa.F32, args[4]))
        total = isa.call(b, f"llvm.vector.reduce.add.v{width}i32", isa.I32, steps)
        isa.store(b, total, isa.at(b, sums.data, isa.I32, args[4]))
        return context.get_dummy_value()

    @intrinsic
    def quantize_group(typingctx, x, q, scale, sums, g):
        return types.none(x, q, scale, sums, types.int64), codegen

    return quantize_group


_quantize_32, _quantize_16 = _make_quantize_group(32), _make_quantize_group(16)


@inner()
def _quantize_row(x, q, scale, sums):
    k, width = x.shape[0], q.shape[0] // scale.shape[0]
    first = k // width if scale.shape[0] == sums.shape[0] and (width == 32 or width == 16) else 0
    for g in range(first):
        if width == 32:
            _quantize_32(x, q, scale, sums, g)
        else:
            _quantize_16(x, q, scale, sums, g)
    for g in range(first, scale.shape[0]):
        start = min(k, g * width)
        scale[g] = _quantize_block(x[start : min(k, (g + 1) * width)], q[g * width : (g + 1) * width])
    width = q.shape[0] // sums.shape[0]
    for g in range(first, sums.shape[0]):
        total = np.int32(0)
        for i in range(g * width, (g + 1) * width):
            total += np.int32(q[i])
        sums[g] = total


def quantize_activations(row, chunk):
    """x, q, scale, sums, rows, k, kpad, groups, scales, groups a chunk: a row in several chunks, where it has a scale
    for each group.
    """
    w, _ = operands(row)
    rows, k, width, a_row = w[4], w[5], w[6] // w[7], (w[7] + w[9] - 1) // w[9]
    n = chunk // a_row
    g0, g1 = part(chunk % a_row, w[9], w[7])
    q = numba.carray(pointer(w[1]), (rows, w[6]), np.int8)[n, g0 * width : g1 * width]
    sums = numba.carray(pointer(w[3]), (rows, w[7]), np.int32)[n, g0:g1]
    x = floats(w[0], (rows, k))[n, min(k, g0 * width) : min(k, g1 * width)]
    _quantize_row(x, q, floats(w[2], (rows, w[8]))[n, g0 : min(g1, w[8])], sums)


# --- quantize_static --------------------------------------------------------------------------------------------------


@inner()
def _to_steps(x, step):
    """x in whole steps, half to even, within -128 and 127; NaN stays NaN."""
    return max(min(np.rint(x / step), np.float32(127)), np.float32(-128))


@inner()
def _quantize_static_row(x, step, q, scale, sums):
    k = x.shape[0]
    fill(q[k:], 0)
    total, damaged = np.int32(0), False
    for i in range(k):
        value = _to_steps(x[i], step)
        if value != value:
            damaged, value = True, np.float32(0)
        q[i] = np.int8(value)
        total += np.int32(q[i])
    if damaged:
        fill(q, 0)
    scale[0] = np.float32(np.nan) if damaged else step
    sums[0] = np.int32(0) if damaged else total


def quantize_static(row, chunk):
    """x, q, scale, sums, rows, k, kpad, step, rows a chunk."""
    w, f = operands(row)
    rows = w[4]
    x, scale = floats(w[0], (rows, w[5])), floats(w[2], (rows, 1))
    q, sums = numba.carray(pointer(w[1]), (rows, w[6]), np.int8), numba.carray(pointer(w[3]), (rows, 1), np.int32)
    for n in range(*part(chunk, w[8], rows)):
        _quantize_static_row(x[n], np.float32(f[7]), q[n], scale[n], sums[n])


@inner()
def round_to_steps(x, step):
    """x = round_half_even(x / step) * step, the integer within -128 and 127, for one axis, in place."""
    for i in range(x.shape[0]):
        x[i] = _to_steps(x[i], step) * step
