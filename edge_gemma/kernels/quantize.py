"""Activations as 8-bit integers.

Owns: everything about these kernels: compiled code, definition, operation. Does not know: the weights they will meet.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.folder import layouts
from edge_gemma.kernels import isa
from edge_gemma.kernels.compiler import chunk_function, inner
from edge_gemma.kernels.convert import fill, float_of_bits
from edge_gemma.kernels.recording.operation import (
    ELEMENTS,
    Operation,
    element_chunks,
    elements,
    floats,
    operands,
    part,
    pointer,
    rows_together,
)
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["quantize_activations", "quantize_static", "round_to_step"]

_SMALLEST = np.float32(2.0**-100)  # below it 127 / amax is no longer a float32
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
    usable = finite and amax >= _SMALLEST
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
        usable = b.and_(finite, b.fcmp_ordered(">=", amax, isa.F32(float(_SMALLEST))))
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


@chunk_function("quantize_activations")
def _quantize_activations_chunk(row, chunk):
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


def _quantize_activations(_, x, group, q, scale, sums):
    (n, kpad), groups, scales = q.shape, sums.shape[1], scale.shape[1]
    if kpad != layouts.padded_k(x.shape[1]) or 32 % max(group, 1) or groups != (kpad // group if group else 1):
        return None
    if scales not in (1, groups):
        return None
    together = max(1, ELEMENTS // (kpad // groups)) if scales == groups else groups
    operand = x, q, scale, sums, *x.shape, kpad, groups, scales, together
    return [Operation(_quantize_activations_chunk, operand, (x,), (q, scale, sums), n * -(-groups // together))]


@kernel(
    "x float32 [n, k]; q int8 [n, kpad]; scale float32 [n, groups or 1]; sums int32 [n, groups]",
    _quantize_activations,
)
def quantize_activations(x: Array, group: int, q: Array, scale: Array, sums: Array) -> None:
    """Symmetric int8: q = round_half_even(x * 127 / max|x|), within +-127.

    kpad is k rounded up to 32 (layouts.padded_k), q is zero beyond k; groups is kpad / group, 1 where group is 0. scale
    has one value a token or one a weight group; sums are those of q over each weight group. A block whose largest
    magnitude is below 2^-100 becomes q = 0, scale = 0; one that holds an infinity or NaN becomes q = 0, scale = NaN, so
    that the damage stays visible.
    """
    n, k = x.shape
    padded = np.zeros(q.shape, np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(n, scale.shape[1], -1)
    amax = np.abs(blocks).max(axis=2)
    finite = np.isfinite(amax)
    usable = finite & (amax >= _SMALLEST)
    scale[...] = np.where(usable, amax / np.float32(127), np.where(finite, np.float32(0), np.float32(np.nan)))
    inverse = np.float32(127) / np.where(usable, amax, np.float32(1))
    blocks = np.where(usable[:, :, None], blocks, np.float32(0))
    q[...] = np.clip(np.rint(blocks * inverse[:, :, None]), -127, 127).astype(np.int8).reshape(q.shape)
    sums[...] = q.reshape(n, sums.shape[1], -1).sum(axis=2, dtype=np.int32)


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


@chunk_function("quantize_static")
def _quantize_static_chunk(row, chunk):
    """x, q, scale, sums, rows, k, kpad, step, rows a chunk."""
    w, f = operands(row)
    rows = w[4]
    x, scale = floats(w[0], (rows, w[5])), floats(w[2], (rows, 1))
    q, sums = numba.carray(pointer(w[1]), (rows, w[6]), np.int8), numba.carray(pointer(w[3]), (rows, 1), np.int32)
    for n in range(*part(chunk, w[8], rows)):
        _quantize_static_row(x[n], np.float32(f[7]), q[n], scale[n], sums[n])


def _quantize_static(_, x, step, q, scale, sums):
    if q.shape[1] != layouts.padded_k(x.shape[1]):
        return None
    together = rows_together(x.shape[1])
    operand = x, q, scale, sums, *x.shape, q.shape[1], float(step), together
    return [Operation(_quantize_static_chunk, operand, (x,), (q, scale, sums), -(-len(x) // together))]


@kernel("x float32 [n, k]; q int8 [n, kpad]; scale float32 [n, 1]; sums int32 [n, 1]", _quantize_static)
def quantize_static(x: Array, step: float, q: Array, scale: Array, sums: Array) -> None:
    """int8 in steps that training fixed: q = round_half_even(x / step), within -128 and 127, zero beyond k.

    scale is `step` as float32, sums are those of q. A row that holds a NaN becomes q = 0, scale = NaN. Source:
    `apply_srq` of transformers' integrations/gemma_quant.py.
    """
    damaged = np.isnan(x).any(axis=1, keepdims=True)
    q[...] = 0
    q[:, : x.shape[1]] = np.clip(np.rint(np.where(damaged, np.float32(0), x) / np.float32(step)), -128, 127)
    scale[...] = np.where(damaged, np.nan, step)
    sums[...] = q.sum(axis=1, keepdims=True, dtype=np.int32)


# --- round_to_step ----------------------------------------------------------------------------------------------------


@inner()
def _round_row(x, step):
    for i in range(x.shape[0]):
        x[i] = _to_steps(x[i], step) * step


@chunk_function("round_to_step")
def _round_to_step_chunk(row, chunk):
    """x, d, step."""
    w, f = operands(row)
    begin, end = elements(chunk, w[1])
    _round_row(floats(w[0], w[1])[begin:end], np.float32(f[2]))


def _round_to_step(_, x, step):
    return [Operation(_round_to_step_chunk, (x, x.size, float(step)), (x,), (x,), element_chunks(x.size))]


@kernel("x float32 [n, d]", _round_to_step)
def round_to_step(x: Array, step: float) -> None:
    """x = round_half_even(x / step) * step, the integer within -128 and 127, in place."""
    x[...] = np.clip(np.rint(x / np.float32(step)), -128, 127) * np.float32(step)
