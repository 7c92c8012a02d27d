"""Norms, rotary positions, gates, the logit cap and the quantisation of activations, in float32.

Owns: everything that works on one row at a time. Does not know: packed weights, caches: these are
plain loops that LLVM vectorises. Small inputs run on the calling thread, since a launch costs microseconds.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import isa
from edge_gemma.kernels.compiler import array, kernel
from edge_gemma.kernels.convert import float_of_bits

_READ_1D, _READ_2D = array("f4", 1), array("f4", 2)
_WRITTEN_1D, _WRITTEN_2D = array("f4", 1, True), array("f4", 2, True)
_F64 = types.float64

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SMALLEST = np.float32(2.0**-100)  # below it 127 / amax is no longer a float32
_INFINITY_BITS = np.int32(0x7F800000)
_SERIAL = 1 << 15  # elements below which threads do not pay


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
def exp32(x):
    """exp(x) in float32: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf); relative error below 2e-7, and 0
    below -87.
    """
    n = np.rint(x * _LOG2E)
    n = min(max(n, np.float32(-127)), np.float32(127))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    r = min(max(r, np.float32(-1)), np.float32(1))
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1)
    return y * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def inverse_rms(x, eps):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))


@numba.njit(fastmath={"contract"}, error_model="numpy")
def rms_norm_row(x, eps, out):
    factor = inverse_rms(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor


@numba.njit(fastmath={"contract"}, error_model="numpy")
def weighted_rms_norm_row(x, weight, eps, out):
    factor = inverse_rms(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@numba.njit(fastmath={"contract"}, error_model="numpy")
def add_rms_norm_row(h, a, weight, eps):
    factor = inverse_rms(a, eps)
    for i in range(h.shape[0]):
        h[i] += a[i] * factor * weight[i]


@kernel(_READ_2D, _F64, _WRITTEN_2D)
def rms_norm_unweighted(x, eps, out):
    if x.shape != out.shape:
        return False
    for n in range(x.shape[0]):
        rms_norm_row(x[n], eps, out[n])
    return True


@kernel(_READ_2D, _READ_1D, _F64, _WRITTEN_2D, parallel=True)
def rms_norm(x, weight, eps, out):
    if x.shape != out.shape or x.shape[1] != weight.shape[0]:
        return False
    if x.size < _SERIAL:
        for n in range(x.shape[0]):
            weighted_rms_norm_row(x[n], weight, eps, out[n])
    else:
        for n in numba.prange(x.shape[0]):
            weighted_rms_norm_row(x[n], weight, eps, out[n])
    return True


@kernel(_WRITTEN_2D, _READ_2D, _READ_1D, _F64, parallel=True)
def add_rms_norm(h, a, weight, eps):
    if h.shape != a.shape or h.shape[1] != weight.shape[0]:
        return False
    if h.size < _SERIAL:
        for n in range(h.shape[0]):
            add_rms_norm_row(h[n], a[n], weight, eps)
    else:
        for n in numba.prange(h.shape[0]):
            add_rms_norm_row(h[n], a[n], weight, eps)
    return True


@numba.njit(fastmath={"contract"}, error_model="numpy")
def scale_row(x, factor):
    for i in range(x.shape[0]):
        x[i] *= factor


@kernel(_WRITTEN_2D, _F64)
def scale(x, factor):
    for n in range(x.shape[0]):
        scale_row(x[n], np.float32(factor))
    return True


@numba.njit(error_model="numpy")  # not contracted: the reference rounds the product
def add_scaled_row(x, y, factor, scale):
    for i in range(x.shape[0]):
        x[i] = (x[i] + y[i] * factor) * scale


@kernel(_WRITTEN_2D, _READ_2D, _F64, _F64, parallel=True)
def add_scaled(x, y, factor, scale):
    if x.shape != y.shape:
        return False
    narrow = np.float32(factor), np.float32(scale)
    if x.size < _SERIAL:
        for n in range(x.shape[0]):
            add_scaled_row(x[n], y[n], narrow[0], narrow[1])
    else:
        for n in numba.prange(x.shape[0]):
            add_scaled_row(x[n], y[n], narrow[0], narrow[1])
    return True


@numba.njit(error_model="numpy")  # not contracted: which of two products is fused would depend on how out lies to x
def norm_rope_row(x, weight, cos, sin, eps, out):
    half = x.shape[0] // 2
    factor = inverse_rms(x, eps)
    for i in range(half):
        first, second = x[i] * factor * weight[i], x[half + i] * factor * weight[half + i]
        out[i] = first * cos[i] - second * sin[i]
        out[half + i] = second * cos[i] + first * sin[i]


@kernel(array("f4", 3), _READ_1D, _READ_2D, _READ_2D, _F64, array("f4", 3, True))
def rms_norm_rope(x, weight, cos, sin, eps, out):
    n, heads, hd = x.shape
    if out.shape != x.shape or weight.shape[0] != hd or hd % 2 or cos.shape != (n, hd // 2) or sin.shape != cos.shape:
        return False
    for i in range(n):
        for h in range(heads):
            norm_rope_row(x[i, h], weight, cos[i], sin[i], eps, out[i, h])
    return True


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
def _gelu(x):
    """x * sigmoid(2 u): the tanh form without its cancellation for negative x."""
    u = np.float32(1.5957691216057308) * x * (np.float32(1) + np.float32(0.044715) * x * x)
    return x / (np.float32(1) + exp32(-u))


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
def gelu_row(gate, up, out):
    if gate.ctypes.data == out.ctypes.data:  # a loop of its own: LLVM does not vectorise one whose arrays may overlap
        for i in range(out.shape[0]):
            out[i] = _gelu(out[i]) * up[i]
    else:
        for i in range(out.shape[0]):
            out[i] = _gelu(gate[i]) * up[i]


@kernel(_READ_2D, _READ_2D, _WRITTEN_2D, parallel=True)
def gelu_tanh_mul(gate, up, out):
    if gate.shape != up.shape or gate.shape != out.shape:
        return False
    if gate.size < _SERIAL:
        for n in range(gate.shape[0]):
            gelu_row(gate[n], up[n], out[n])
    else:
        for n in numba.prange(gate.shape[0]):
            gelu_row(gate[n], up[n], out[n])
    return True


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
def softcap_row(x, cap):
    inverse = np.float32(1) / np.float32(cap)
    for i in range(x.shape[0]):
        y = x[i] * inverse
        z = y * y
        near = np.float32(-5.37397155531e-2) + z * (np.float32(2.06390887954e-2) + z * np.float32(-5.70498872745e-3))
        near = y + y * z * (np.float32(-3.33332819422e-1) + z * (np.float32(1.33314422036e-1) + z * near))
        e = exp32(np.float32(-2) * abs(y))
        far = (np.float32(1) - e) / (np.float32(1) + e)
        far = far if y > np.float32(0) else -far
        x[i] = np.float32(cap) * (near if abs(y) < np.float32(0.625) else far)


@kernel(_WRITTEN_1D, _F64)
def softcap(x, cap):
    softcap_row(x, cap)
    return True


@numba.njit(fastmath={"contract"}, error_model="numpy")
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
        q[k:] = 0
    else:
        q[:] = 0
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


@numba.njit(error_model="numpy")
def quantize_row(x, q, scale, sums):
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


@kernel(_READ_2D, types.int64, array("i1", 2, True), _WRITTEN_2D, array("i4", 2, True), parallel=True)
def quantize_activations(x, group, q, scale, sums):
    n, kpad = q.shape
    groups = kpad // group if group else 1
    if kpad != (x.shape[1] + 31) // 32 * 32 or x.shape[0] != n or sums.shape != (n, groups) or 32 % max(group, 1):
        return False
    if scale.shape[0] != n or (scale.shape[1] != groups and scale.shape[1] != 1):
        return False
    if x.size < _SERIAL:
        for n in range(x.shape[0]):
            quantize_row(x[n], q[n], scale[n], sums[n])
    else:
        for n in numba.prange(x.shape[0]):
            quantize_row(x[n], q[n], scale[n], sums[n])
    return True


@numba.njit(error_model="numpy")
def to_steps(x, step):
    """x in whole steps, half to even, within -128 and 127; NaN stays NaN."""
    return max(min(np.rint(x / step), np.float32(127)), np.float32(-128))


@numba.njit(error_model="numpy")
def quantize_static_row(x, step, q, scale, sums):
    k = x.shape[0]
    q[k:] = 0
    total, damaged = np.int32(0), False
    for i in range(k):
        value = to_steps(x[i], step)
        if value != value:
            damaged, value = True, np.float32(0)
        q[i] = np.int8(value)
        total += np.int32(q[i])
    if damaged:
        q[:] = 0
    scale[0] = np.float32(np.nan) if damaged else step
    sums[0] = np.int32(0) if damaged else total


@kernel(_READ_2D, _F64, array("i1", 2, True), _WRITTEN_2D, array("i4", 2, True), parallel=True)
def quantize_static(x, step, q, scale, sums):
    n, kpad = q.shape
    if kpad != (x.shape[1] + 31) // 32 * 32 or x.shape[0] != n or sums.shape != (n, 1) or scale.shape != (n, 1):
        return False
    narrow = np.float32(step)
    if x.size < _SERIAL:
        for i in range(n):
            quantize_static_row(x[i], narrow, q[i], scale[i], sums[i])
    else:
        for i in numba.prange(n):
            quantize_static_row(x[i], narrow, q[i], scale[i], sums[i])
    return True


@numba.njit(error_model="numpy")
def round_row(x, step):
    for i in range(x.shape[0]):
        x[i] = to_steps(x[i], step) * step


@kernel(_WRITTEN_2D, _F64, parallel=True)
def round_to_step(x, step):
    narrow = np.float32(step)
    if x.size < _SERIAL:
        for n in range(x.shape[0]):
            round_row(x[n], narrow)
    else:
        for n in numba.prange(x.shape[0]):
            round_row(x[n], narrow)
    return True
