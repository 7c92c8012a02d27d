"""Writing keys and values into ring caches.

Owns: everything about this kernel: compiled code, definition, operation. Does not know: who reads the caches.
"""

import functools

import numba
import numpy as np

from edge_gemma.kernels.compiler import chunk_function, inner
from edge_gemma.kernels.convert import to_half
from edge_gemma.kernels.recording.operation import (
    Operation,
    floats,
    operands,
    part,
    pointer,
    position_of,
    rows_together,
)
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["store_kv"]


@functools.cache
def _make_store_row(half):
    """store_row(rows float32 [KV, hd], slot [KV, hd])."""

    @inner()
    def store_row(rows, slot):
        for h in range(rows.shape[0]):
            for d in range(rows.shape[1]):
                slot[h, d] = to_half(rows[h, d]) if half else rows[h, d]

    return store_row


@functools.cache
def _make_chunk(half):
    """k, v, ring, n, KV, hd, rows a chunk."""
    store_row = _make_store_row(half)
    dtype = np.uint16 if half else np.float32

    def store_kv(row, chunk):
        w, _ = operands(row)
        position, ring = position_of(row), numba.carray(pointer(w[2]), 3, np.int64)
        if position < 0:
            return
        shape, cache = (w[3], w[4], w[5]), (ring[2], w[4], w[5])
        for source, target in ((w[0], ring[0]), (w[1], ring[1])):
            rows, slots = floats(source, shape), numba.carray(pointer(target), cache, dtype)
            for i in range(*part(chunk, w[6], w[3])):
                store_row(rows[i], slots[(position + i) % ring[2]])

    return chunk_function(f"store_kv {half}")(store_kv)


def fit(k_cache, v_cache, kv_heads, hd):
    """Whether these are the caches of a layer with such heads."""
    if k_cache.shape != v_cache.shape or k_cache.shape[1:] != (kv_heads, hd) or k_cache.dtype != v_cache.dtype:
        return False
    return k_cache.dtype in (np.uint16, np.float32) and k_cache.flags.c_contiguous and v_cache.flags.c_contiguous


def _store_kv(memory, k, v, k_cache, v_cache, first_position):
    n, kv_heads, hd = k.shape
    if not fit(k_cache, v_cache, kv_heads, hd) or n > len(k_cache) or first_position[0] < -1:
        return None
    function, together = _make_chunk(k_cache.dtype == np.uint16), rows_together(kv_heads * hd)
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
