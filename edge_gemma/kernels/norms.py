"""RMS norms, in float32.

Owns: definition and operation of these kernels. Does not know: their loops (compiled/norms.py), which layer calls them.
"""

import numpy as np

from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import Operation, rows_together
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_rope"]


def _normed(x, eps):
    """float64: x / sqrt(mean(x^2) + eps) over the last axis."""
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps)


# --- rms_norm ---------------------------------------------------------------------------------------------------------

_rms_norm_chunk = chunk_function("kernels.compiled.norms", "rms_norm")


def _rms_norm(_, x, weight, eps, out):
    together = rows_together(x.shape[1])
    operand = x, weight, out, *x.shape, float(eps), together
    return [Operation(_rms_norm_chunk, operand, (x,), (out,), -(-len(x) // together))]


@kernel("x, out float32 [n, d]; weight float32 [d] or None", _rms_norm)
def rms_norm(x: Array, weight: Array | None, eps: float, out: Array) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis; without a weight, times 1."""
    out[...] = _normed(x, eps) if weight is None else _normed(x, eps) * weight


# --- add_rms_norm -----------------------------------------------------------------------------------------------------

_add_rms_norm_chunk = chunk_function("kernels.compiled.norms", "add_rms_norm")


def _add_rms_norm(_, h, a, weight, eps):
    together = rows_together(h.shape[1])
    operand = h, a, weight, *h.shape, float(eps), together
    return [Operation(_add_rms_norm_chunk, operand, (a, h), (h,), -(-len(h) // together))]


@kernel("h, a float32 [n, d]; weight float32 [d]", _add_rms_norm)
def add_rms_norm(h: Array, a: Array, weight: Array, eps: float) -> None:
    """h += rms_norm(a) * weight."""
    h += (_normed(a, eps) * weight).astype(np.float32)


# --- rms_norm_rope ----------------------------------------------------------------------------------------------------

_rms_norm_rope_chunk = chunk_function("kernels.compiled.norms", "rms_norm_rope")


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
