"""What numba compiles of RMS norms (kernels/norms.py).

Owns: their chunk functions. Does not know: when they are called.
"""

import numpy as np

from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.operands import floats, operands, part


@inner(fastmath={"contract", "reassoc", "nsz"})
def _inverse_rms(x, eps):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))


# --- rms_norm ---------------------------------------------------------------------------------------------------------


@inner(fastmath={"contract"})
def _rms_norm_row(x, eps, out):
    factor = _inverse_rms(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor


@inner(fastmath={"contract"})
def _weighted_rms_norm_row(x, weight, eps, out):
    factor = _inverse_rms(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


def rms_norm(row, chunk):
    """x, weight or 0, out, rows, d, eps, rows a chunk."""
    w, f = operands(row)
    shape = w[3], w[4]
    x, out = floats(w[0], shape), floats(w[2], shape)
    for n in range(*part(chunk, w[6], w[3])):
        if w[1]:
            _weighted_rms_norm_row(x[n], floats(w[1], w[4]), f[5], out[n])
        else:
            _rms_norm_row(x[n], f[5], out[n])


# --- add_rms_norm -----------------------------------------------------------------------------------------------------


@inner(fastmath={"contract"})
def _add_rms_norm_row(h, a, weight, eps):
    factor = _inverse_rms(a, eps)
    for i in range(h.shape[0]):
        h[i] += a[i] * factor * weight[i]


def add_rms_norm(row, chunk):
    """h, a, weight, rows, d, eps, rows a chunk."""
    w, f = operands(row)
    shape = w[3], w[4]
    h, a, weight = floats(w[0], shape), floats(w[1], shape), floats(w[2], w[4])
    for n in range(*part(chunk, w[6], w[3])):
        _add_rms_norm_row(h[n], a[n], weight, f[5])


# --- rms_norm_rope ----------------------------------------------------------------------------------------------------


@inner()  # not contracted: which of two products is fused would depend on how out lies to x
def _norm_rope_row(x, weight, cos, sin, eps, out):
    half = x.shape[0] // 2
    factor = _inverse_rms(x, eps)
    for i in range(half):
        first, second = x[i] * factor * weight[i], x[half + i] * factor * weight[half + i]
        out[i] = first * cos[i] - second * sin[i]
        out[half + i] = second * cos[i] + first * sin[i]


def rms_norm_rope(row, chunk):
    """x, weight, cos, sin, out, n, heads, hd, eps, rows a chunk."""
    w, f = operands(row)
    shape, angles = (w[5], w[6], w[7]), (w[5], w[7] // 2)
    x, out, weight = floats(w[0], shape), floats(w[4], shape), floats(w[1], w[7])
    cos, sin = floats(w[2], angles), floats(w[3], angles)
    for n in range(*part(chunk, w[9], w[5])):
        for h in range(w[6]):
            _norm_rope_row(x[n, h], weight, cos[n], sin[n], f[8], out[n, h])
