"""Writing keys and values into ring caches.

Owns: definition and operation of this kernel. Does not know: its loop (compiled/attend/store.py), who reads the caches.
"""

import numpy as np

from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import Operation, rows_together
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["store_kv"]


def fit(k_cache, v_cache, kv_heads, hd):
    """Whether these are the caches of a layer with such heads."""
    if k_cache.shape != v_cache.shape or k_cache.shape[1:] != (kv_heads, hd) or k_cache.dtype != v_cache.dtype:
        return False
    return k_cache.dtype in (np.uint16, np.float32) and k_cache.flags.c_contiguous and v_cache.flags.c_contiguous


def _store_kv(memory, k, v, k_cache, v_cache, first_position):
    n, kv_heads, hd = k.shape
    if not fit(k_cache, v_cache, kv_heads, hd) or n > len(k_cache) or first_position[0] < -1:
        return None
    function = chunk_function("kernels.compiled.attend.store", "store_kv", k_cache.dtype == np.uint16)
    together = rows_together(kv_heads * hd)
    operand = k, v, memory.ring(first_position, k_cache, v_cache), n, kv_heads, hd, together
    caches = k_cache, v_cache
    return [Operation(function, operand, (k, v), (), -(-n // together), position=first_position, appends=caches)]


@kernel(
    "k, v float32 [n, kv_heads, hd]; caches of one type, [n or more, kv_heads, hd]; first_position int64 [1]", _store_kv
)
def store_kv(k: Array, v: Array, k_cache: Array, v_cache: Array, first_position: Array) -> None:
    """Write the keys and values of positions first_position, first_position + 1, ... into slots position % capacity.

    Caches are float32, or uint16 holding float16: values beyond +-65504 are clamped. Position -1: there is no token.
    """
    first = int(first_position[0])
    for i in range(len(k) if first >= 0 else 0):
        slot = (first + i) % len(k_cache)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            half = cache.dtype == np.uint16
            cache[slot] = np.clip(rows[i], -65504, 65504).astype(np.float16).view(np.uint16) if half else rows[i]
