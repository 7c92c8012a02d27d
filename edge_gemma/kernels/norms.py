"""RMS norms, in float32.

Owns: everything about these kernels: compiled code, definition, operation. Does not know: which layer calls them.
"""

import numpy as np

from edge_gemma.kernels.compiler import chunk_function, inner
from edge_gemma.kernels.recording.operation import Operation, floats, operands, part, rows_together
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_rope"]


@inner(fastmath={"contract", "reassoc", "nsz"})
def _inverse_rms(x, eps):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))


def _normed(x, eps):
    """float64: x / sqrt(mean(x^2) + eps) over the last axis."""
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps)


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


@chunk_function("rms_norm")
def _rms_norm_chunk(row, chunk):
    """x, weight or 0, out, rows, d, eps, rows a chunk."""
    w, f = operands(row)
    shape = w[3], w[4]
    x, out = floats(w[0], shape), floats(w[2], shape)
    for n in range(*part(chunk, w[6], w[3])):
        if w[1]:
            _weighted_rms_norm_row(x[n], floats(w[1], w[4]), f[5], out[n])
        else:
            _rms_norm_row(x[n], f[5], out[n])


def _rms_norm(_, x, weight, eps, out):
    together = rows_together(x.shape[1])
    operand = x, weight, out, *x.shape, float(eps), together
    return [Operation(_rms_norm_chunk, operand, (x,), (out,), -(-len(x) // together))]


@kernel("x, out float32 [n, d]; weight float32 [d] or None", _rms_norm)
def rms_norm(x: Array, weight: Array | None, eps: float, out: Array) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis; without a weight, times 1."""
    out[...] = _normed(x, eps) if weight is None else _normed(x, eps) * weight


# --- add_rms_norm -----------------------------------------------------------------------------------------------------


@inner(fastmath={"contract"})
def _add_rms_norm_row(h, a, weight, eps):
    factor = _inverse_rms(a, eps)
    for i in range(h.shape[0]):
        h[i] += a[i] * factor * weight[i]


@chunk_function("add_rms_norm")
def _add_rms_norm_chunk(row, chunk):
    """h, a, weight, rows, d, eps, rows a chunk."""
    w, f = operands(row)
    shape = w[3], w[4]
    h, a, weight = floats(w[0], shape), floats(w[1], shape), floats(w[2], w[4])
    for n in range(*part(chunk, w[6], w[3])):
        _add_rms_norm_row(h[n], a[n], weight, f[5])


def _add_rms_norm(_, h, a, weight, eps):
    together = rows_together(h.shape[1])
    operand = h, a, weight, *h.shape, float(eps), together
    return [Operation(_add_rms_norm_chunk, operand, (a, h), (h,), -(-len(h) // together))]


@kernel("h, a float32 [n, d]; weight float32 [d]", _add_rms_norm)
def add_rms_norm(h: Array, a: Array, weight: Array, eps: float) -> None:
    """h += rms_norm(a) * weight."""
    h += (_normed(a, eps) * weight).astype(np.float32)


# --- rms_norm_rope ----------------------------------------------------------------------------------------------------


@inner()  # not contracted: which of two products is fused would depend on how out lies to x
def _norm_rope_row(x, weight, cos, sin, eps, out):
    half = x.shape[0] // 2
    factor = _inverse_rms(x, eps)
    for i in range(half):
        first, second = x[i] * factor * weight[i], x[half + i] * factor * weight[half + i]
        out[i] = first * cos[i] - second * sin[i]
        out[half + i] = second * cos[i] + first * sin[i]


@chunk_function("rms_norm_rope")
def _rms_norm_rope_chunk(row, chunk):
    """x, weight, cos, sin, out, n, heads, hd, eps, rows a chunk."""
    w, f = operands(row)
    shape, angles = (w[5], w[6], w[7]), (w[5], w[7] // 2)
    x, out, weight = floats(w[0], shape), floats(w[4], shape), floats(w[1], w[7])
    cos, sin = floats(w[2], angles), floats(w[3], angles)
    for n in range(*part(chunk, w[9], w[5])):
        for h in range(w[6]):
            _norm_rope_row(x[n, h], weight, cos[n], sin[n], f[8], out[n, h])


def _rms_norm_rope(_, x, weight, cos, sin, eps, out):
    n, heads, hd = x.shape
    if hd % 2 or cos.shape != (n, hd // 2) or sin.shape != cos.shape:
        return None
    together = rows_together(heads * hd)
    operand = x, weight, cos, sin, out, n, heads, hd, float(eps), together
    return [Operation(_rms_norm_rope_chunk, operand, (x, cos, sin), (out,), -(-n // together))]


@kernel("x, out float32 [n, heads, hd]; weight float32 [hd]; cos, sin float32 [n, hd / 2]", _rms_norm_rope)
def rms_norm_rope(x: Array, weight: Array, cos: Array, sin: Array, eps: float, out: Array) -> None:
    """RMS norm of every head, then rotary positions on pairs (i, i + hd / 2); out may be x."""
    y, half = _normed(x, eps) * weight, x.shape[2] // 2
    first, second = y[..., :half], y[..., half:]
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    out[..., :half] = first * c - second * s
    out[..., half:] = second * c + first * s
