"""The kernels as functions that return what they compute, so that the forward pass reads like the paper.

Owns: where results lie. Does not know: arithmetic (kernels/), order of operations (decoder.py). Every `memory` is a
field of RunState, or None for a new array.
"""

import numpy as np

from edge_gemma import kernels
from edge_gemma.model.run_state import shaped


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float, memory: np.ndarray | None = None) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: float32, x's shape. Without a weight: times 1."""
    out = shaped(memory, x.shape)
    kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, out.reshape(-1, x.shape[-1]))
    return out


def rms_norm_rope(
    x: np.ndarray, weight: np.ndarray, cos: np.ndarray, sin: np.ndarray, eps: float, memory: np.ndarray | None = None
) -> np.ndarray:
    """Norm over head_dim, then rotate pairs (i, i + hd / 2): float32 [n, heads, hd]; cos, sin: [n, hd / 2]."""
    out = shaped(memory, x.shape)
    kernels.rms_norm_rope(x, weight, cos, sin, eps, out)
    return out


def gelu_mul(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gelu(gate) * up with the tanh approximation of GELU: float32 [n, k], in the place of `gate`."""
    kernels.gelu_tanh_mul(gate, up, gate)
    return gate


def attention(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    first: np.ndarray,
    window: int | None,
    scale: float,
    memory: np.ndarray | None = None,
) -> np.ndarray:
    """Causal attention of queries at positions first, first + 1, ... over a cache: float32 [n, heads * hd].

    first: int64 [1].
    """
    out = shaped(memory, q.shape)
    kernels.attention(q, k_cache, v_cache, first, window or 0, scale, out)
    return out.reshape(len(q), -1)


def full_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k^T) v where every query sees every key: float32 [n, heads, hd], as q, k and v."""
    out = np.empty_like(q)
    kernels.full_attention(q, k, v, out)
    return out
