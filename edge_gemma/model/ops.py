"""The kernels as functions that return new arrays, so that the forward pass reads like the paper.

Owns: allocating results. Does not know: arithmetic (kernels/), order of operations (decoder.py).
"""

import numpy as np

from edge_gemma import kernels
from edge_gemma.kernels.buffers import empty


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: float32, x's shape. Without a weight: times 1."""
    flat = x.reshape(-1, x.shape[-1])
    out = empty(flat.shape)
    kernels.rms_norm(flat, weight, eps, out)
    return out.reshape(x.shape)


def rms_norm_rope(x: np.ndarray, weight: np.ndarray, cos: np.ndarray, sin: np.ndarray, eps: float) -> np.ndarray:
    """Norm over head_dim, then rotate pairs (i, i + hd / 2): float32 [n, heads, hd]; cos, sin: [n, hd / 2]."""
    out = empty(x.shape)
    kernels.rms_norm_rope(x, weight, cos, sin, eps, out)
    return out


def gelu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gelu(gate) * up with the tanh approximation of GELU: float32 [n, k], in the place of `gate`."""
    kernels.gelu_tanh_mul(gate, up, gate)
    return gate


def attention(
    q: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, first: int, window: int | None, scale: float
) -> np.ndarray:
    """Causal attention of queries at positions first, first + 1, ... over a cache: float32 [n, heads * hd]."""
    out = empty(q.shape)
    kernels.attention(q, k_cache, v_cache, first, window or 0, scale, out)
    return out.reshape(len(q), -1)
