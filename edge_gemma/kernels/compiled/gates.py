"""What numba compiles of gates, scalings, the cap of logits and a change of order (kernels/gates.py).

Owns: their chunk functions; exp() for other kernels. Does not know: when they are called. The loops are plain, LLVM
vectorises them.
"""

import numpy as np

from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import copy, float_of_bits
from edge_gemma.kernels.compiled.operands import elements, floats, operands

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)


@inner(fastmath={"contract", "nsz"})
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


# --- scale ------------------------------------------------------------------------------------------------------------


@inner(fastmath={"contract"})
def _scale_row(x, factor):
    for i in range(x.shape[0]):
        x[i] *= factor


def scale(row, chunk):
    """x, d, factor."""
    w, f = operands(row)
    begin, end = elements(chunk, w[1])
    _scale_row(floats(w[0], w[1])[begin:end], np.float32(f[2]))


# --- add_scaled -------------------------------------------------------------------------------------------------------


@inner()  # not contracted: the reference rounds the product
def _add_scaled_row(x, y, factor, scale):
    for i in range(x.shape[0]):
        x[i] = (x[i] + y[i] * factor) * scale


def add_scaled(row, chunk):
    """x, y, d, factor, scale."""
    w, f = operands(row)
    begin, end = elements(chunk, w[2])
    x, y = floats(w[0], w[2]), floats(w[1], w[2])
    _add_scaled_row(x[begin:end], y[begin:end], np.float32(f[3]), np.float32(f[4]))


# --- gelu_tanh_mul ----------------------------------------------------------------------------------------------------


@inner(fastmath={"contract", "nsz"})
def _gelu(x):
    """x * sigmoid(2 u): the tanh form without its cancellation for negative x."""
    u = np.float32(1.5957691216057308) * x * (np.float32(1) + np.float32(0.044715) * x * x)
    return x / (np.float32(1) + exp32(-u))


@inner(fastmath={"contract", "nsz"})
def _gelu_row(gate, up, out):
    if gate.ctypes.data == out.ctypes.data:  # a loop of its own: LLVM does not vectorise one whose arrays may overlap
        for i in range(out.shape[0]):
            out[i] = _gelu(out[i]) * up[i]
    else:
        for i in range(out.shape[0]):
            out[i] = _gelu(gate[i]) * up[i]


def gelu_tanh_mul(row, chunk):
    """gate, up, out, d."""
    w, _ = operands(row)
    begin, end = elements(chunk, w[3])
    gate, up, out = floats(w[0], w[3]), floats(w[1], w[3]), floats(w[2], w[3])
    _gelu_row(gate[begin:end], up[begin:end], out[begin:end])


# --- layers_first -----------------------------------------------------------------------------------------------------


def layers_first(row, chunk):
    """x, out, n, layers, d: the rows of a token."""
    w, _ = operands(row)
    x, out = floats(w[0], (w[2], w[3], w[4])), floats(w[1], (w[3], w[2], w[4]))
    for j in range(w[3]):
        copy(x[chunk, j], out[j, chunk])


# --- softcap ----------------------------------------------------------------------------------------------------------


@inner(fastmath={"contract", "nsz"})
def _softcap_row(x, cap):
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


def softcap(row, chunk):
    """x, d, cap."""
    w, f = operands(row)
    begin, end = elements(chunk, w[1])
    _softcap_row(floats(w[0], w[1])[begin:end], f[2])
