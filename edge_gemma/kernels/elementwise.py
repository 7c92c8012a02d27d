"""Norms, rotary positions, gates, the logit cap and the quantisation of activations, in float32.

Owns: everything that works on one row at a time. Does not know: packed weights, caches, instruction sets: these are
plain loops that LLVM vectorises. Small inputs run on the calling thread, since a launch costs microseconds.
"""

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels.jit import kernel

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_SMALLEST = np.float32(2.0**-100)  # below it 127 / amax is no longer a float32
_INFINITY_BITS = np.int32(0x7F800000)
_SERIAL = 1 << 15  # elements below which threads do not pay


@intrinsic
def _float_of_bits(typingctx, bits):
    """The float32 whose bits are an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


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
    return y * _float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _inverse_rms(x, eps):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _norm_row(x, weight, eps, out):
    factor = _inverse_rms(x, eps)
    if weight is None:
        for i in range(x.shape[0]):
            out[i] = x[i] * factor
    else:
        for i in range(x.shape[0]):
            out[i] = x[i] * factor * weight[i]


@kernel
def rms_norm(x, weight, eps, out):
    for n in range(x.shape[0]):
        _norm_row(x[n], weight, eps, out[n])


@kernel
def add_rms_norm(h, a, weight, eps):
    for n in range(h.shape[0]):
        factor = _inverse_rms(a[n], eps)
        for i in range(h.shape[1]):
            h[n, i] += a[n, i] * factor * weight[i]


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _rotate(x, cos, sin):
    half = x.shape[0] // 2
    for i in range(half):
        first, second = x[i], x[half + i]
        x[i] = first * cos[i] - second * sin[i]
        x[half + i] = second * cos[i] + first * sin[i]


@kernel
def rms_norm_rope(x, weight, cos, sin, eps, out):
    for n in range(x.shape[0]):
        for h in range(x.shape[1]):
            _norm_row(x[n, h], weight, eps, out[n, h])
            _rotate(out[n, h], cos[n], sin[n])


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
def _gelu_row(gate, up, out):
    """x * sigmoid(2 u): the tanh form without its cancellation for negative x."""
    for i in range(gate.shape[0]):
        x = gate[i]
        u = np.float32(1.5957691216057308) * x * (np.float32(1) + np.float32(0.044715) * x * x)
        out[i] = x / (np.float32(1) + exp32(-u)) * up[i]


@kernel(parallel=True)
def gelu_tanh_mul(gate, up, out):
    if gate.size < _SERIAL:
        for n in range(gate.shape[0]):
            _gelu_row(gate[n], up[n], out[n])
    else:
        for n in numba.prange(gate.shape[0]):
            _gelu_row(gate[n], up[n], out[n])


@kernel(fastmath={"contract", "nsz"})
def softcap(x, cap):
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


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _quantize_block(x, q):
    """One scale's worth of a row, k <= q.shape[0] values; returns the scale. q beyond k becomes 0."""
    k = x.shape[0]
    bits = x.view(np.int32)
    top = np.int32(0)
    for i in range(k):
        top = max(top, bits[i] & np.int32(0x7FFFFFFF))
    amax = _float_of_bits(top)
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


@numba.njit(error_model="numpy")
def _quantize_row(x, q, scale, sums):
    k, width = x.shape[0], q.shape[0] // scale.shape[0]
    for g in range(scale.shape[0]):
        start = min(k, g * width)
        scale[g] = _quantize_block(x[start : min(k, (g + 1) * width)], q[g * width : (g + 1) * width])
    width = q.shape[0] // sums.shape[0]
    for g in range(sums.shape[0]):
        total = np.int32(0)
        for i in range(g * width, (g + 1) * width):
            total += np.int32(q[i])
        sums[g] = total


@kernel(parallel=True)
def quantize_activations(x, q, scale, sums):
    if x.size < _SERIAL:
        for n in range(x.shape[0]):
            _quantize_row(x[n], q[n], scale[n], sums[n])
    else:
        for n in numba.prange(x.shape[0]):
            _quantize_row(x[n], q[n], scale[n], sums[n])
