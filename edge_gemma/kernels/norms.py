"""RMS norms, in float32.

Owns: everything about these kernels: compiled code, definition, operation. Does not know: which layer calls them.
"""

import numba
import numpy as np
from numba.core import types

from edge_gemma.kernels.compiler import SERIAL_ELEMENTS, array, chunk_function, compiled, launch
from edge_gemma.kernels.recording.operation import ELEMENTS, Operation, floats, operands
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_rope"]

_READ_1D, _READ_2D, _WRITTEN_2D = array("f4", 1), array("f4", 2), array("f4", 2, True)
_F64 = types.float64


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
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


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _rms_norm_row(x, eps, out):
    factor = _inverse_rms(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _weighted_rms_norm_row(x, weight, eps, out):
    factor = _inverse_rms(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@compiled(_READ_2D, _F64, _WRITTEN_2D)
def _rms_norm_unweighted(x, eps, out):
    if x.shape != out.shape:
        return False
    for n in range(x.shape[0]):
        _rms_norm_row(x[n], eps, out[n])
    return True


@compiled(_READ_2D, _READ_1D, _F64, _WRITTEN_2D, parallel=True)
def _rms_norm(x, weight, eps, out):
    if x.shape != out.shape or x.shape[1] != weight.shape[0]:
        return False
    if x.size < SERIAL_ELEMENTS:
        for n in range(x.shape[0]):
            _weighted_rms_norm_row(x[n], weight, eps, out[n])
    else:
        for n in numba.prange(x.shape[0]):
            _weighted_rms_norm_row(x[n], weight, eps, out[n])
    return True


@chunk_function("rms_norm")
def _rms_norm_chunk(row, chunk):
    """x, weight or 0, out, rows, d, eps, rows a chunk."""
    w, f = operands(row)
    shape = w[3], w[4]
    x, out = floats(w[0], shape), floats(w[2], shape)
    for n in range(chunk * w[6], min(w[3], (chunk + 1) * w[6])):
        if w[1]:
            _weighted_rms_norm_row(x[n], floats(w[1], w[4]), f[5], out[n])
        else:
            _rms_norm_row(x[n], f[5], out[n])


def _launch_rms_norm(x, weight, eps, out):
    return launch(_rms_norm_unweighted, x, eps, out) if weight is None else launch(_rms_norm, x, weight, eps, out)


def _record_rms_norm(_, x, weight, eps, out):
    together = max(1, ELEMENTS // x.shape[1])
    operand = x, weight, out, *x.shape, float(eps), together
    yield Operation(_rms_norm_chunk, operand, (x,), (out,), -(-len(x) // together))


@kernel(_launch_rms_norm, "x, out float32 [n, d]; weight float32 [d] or None", _record_rms_norm)
def rms_norm(x: Array, weight: Array | None, eps: float, out: Array) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis; without a weight, times 1."""
    out[...] = _normed(x, eps) if weight is None else _normed(x, eps) * weight


# --- add_rms_norm -----------------------------------------------------------------------------------------------------


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _add_rms_norm_row(h, a, weight, eps):
    factor = _inverse_rms(a, eps)
    for i in range(h.shape[0]):
        h[i] += a[i] * factor * weight[i]


@compiled(_WRITTEN_2D, _READ_2D, _READ_1D, _F64, parallel=True)
def _add_rms_norm(h, a, weight, eps):
    if h.shape != a.shape or h.shape[1] != weight.shape[0]:
        return False
    if h.size < SERIAL_ELEMENTS:
        for n in range(h.shape[0]):
            _add_rms_norm_row(h[n], a[n], weight, eps)
    else:
        for n in numba.prange(h.shape[0]):
            _add_rms_norm_row(h[n], a[n], weight, eps)
    return True


@chunk_function("add_rms_norm")
def _add_rms_norm_chunk(row, chunk):
    """h, a, weight, rows, d, eps: a row."""
    w, f = operands(row)
    shape = w[3], w[4]
    _add_rms_norm_row(floats(w[0], shape)[chunk], floats(w[1], shape)[chunk], floats(w[2], w[4]), f[5])


def _record_add_rms_norm(_, h, a, weight, eps):
    yield Operation(_add_rms_norm_chunk, (h, a, weight, *h.shape, float(eps)), (a, h), (h,), len(h))


@kernel(_add_rms_norm, "h, a float32 [n, d]; weight float32 [d]", _record_add_rms_norm)
def add_rms_norm(h: Array, a: Array, weight: Array, eps: float) -> None:
    """h += rms_norm(a) * weight."""
    h += (_normed(a, eps) * weight).astype(np.float32)


# --- rms_norm_rope ----------------------------------------------------------------------------------------------------


@numba.njit(error_model="numpy")  # not contracted: which of two products is fused would depend on how out lies to x
def _norm_rope_row(x, weight, cos, sin, eps, out):
    half = x.shape[0] // 2
    factor = _inverse_rms(x, eps)
    for i in range(half):
        first, second = x[i] * factor * weight[i], x[half + i] * factor * weight[half + i]
        out[i] = first * cos[i] - second * sin[i]
        out[half + i] = second * cos[i] + first * sin[i]


@compiled(array("f4", 3), _READ_1D, _READ_2D, _READ_2D, _F64, array("f4", 3, True))
def _rms_norm_rope(x, weight, cos, sin, eps, out):
    n, heads, hd = x.shape
    if out.shape != x.shape or weight.shape[0] != hd or hd % 2 or cos.shape != (n, hd // 2) or sin.shape != cos.shape:
        return False
    for i in range(n):
        for h in range(heads):
            _norm_rope_row(x[i, h], weight, cos[i], sin[i], eps, out[i, h])
    return True


@chunk_function("rms_norm_rope")
def _rms_norm_rope_chunk(row, chunk):
    """x, weight, cos, sin, out, n, heads, hd, eps: a row."""
    w, f = operands(row)
    shape, angles = (w[5], w[6], w[7]), (w[5], w[7] // 2)
    x, out, weight = floats(w[0], shape)[chunk], floats(w[4], shape)[chunk], floats(w[1], w[7])
    cos, sin = floats(w[2], angles)[chunk], floats(w[3], angles)[chunk]
    for h in range(w[6]):
        _norm_rope_row(x[h], weight, cos, sin, f[8], out[h])


def _record_rms_norm_rope(_, x, weight, cos, sin, eps, out):
    operand = x, weight, cos, sin, out, *x.shape, float(eps)
    yield Operation(_rms_norm_rope_chunk, operand, (x, cos, sin), (out,), len(x))


@kernel(
    _rms_norm_rope,
    "x, out float32 [n, heads, hd]; weight float32 [hd]; cos, sin float32 [n, hd / 2]",
    _record_rms_norm_rope,
)
def rms_norm_rope(x: Array, weight: Array, cos: Array, sin: Array, eps: float, out: Array) -> None:
    """RMS norm of every head, then rotary positions on pairs (i, i + hd / 2); out may be x."""
    y, half = _normed(x, eps) * weight, x.shape[2] // 2
    first, second = y[..., :half], y[..., half:]
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    out[..., :half] = first * c - second * s
    out[..., half:] = second * c + first * s
