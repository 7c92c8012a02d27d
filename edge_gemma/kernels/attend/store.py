"""Writing keys and values into ring caches.

Owns: everything about this kernel: compiled code, definition, operation. Does not know: who reads the caches.
"""

import functools

import numba
import numpy as np
from numba.core import types

from edge_gemma.kernels.compiler import array, chunk_function, compiled, launch
from edge_gemma.kernels.convert import to_half
from edge_gemma.kernels.recording.operation import Operation, floats, one_row, operands, pointer
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["store_kv"]


@functools.cache
def _make_store_row(half):
    """store_row(rows float32 [KV, hd], slot [KV, hd])."""

    @numba.njit(error_model="numpy")
    def store_row(rows, slot):
        for h in range(rows.shape[0]):
            for d in range(rows.shape[1]):
                slot[h, d] = to_half(rows[h, d]) if half else rows[h, d]

    return store_row


@functools.cache
def _make_store(half):
    """The kernel that writes rows into ring caches."""
    store_row = _make_store_row(half)

    def store_kv(k, v, k_cache, v_cache, first_position):
        n, kv_heads, hd = k.shape
        capacity = k_cache.shape[0]
        if v.shape != k.shape or v_cache.shape != k_cache.shape or k_cache.shape[1:] != (kv_heads, hd):
            return False
        if n > capacity or first_position < 0:
            return False
        for i in range(n):
            slot = (first_position + i) % capacity
            store_row(k[i], k_cache[slot])
            store_row(v[i], v_cache[slot])
        return True

    store_kv.__name__ = f"store_kv_{'half' if half else 'float'}"
    rows, cache = array("f4", 3), array("u2" if half else "f4", 3, True)
    return compiled(rows, rows, cache, cache, types.int64, key=store_kv.__name__)(store_kv)


def _launch(k, v, k_cache, v_cache, first_position):
    return launch(_make_store(k_cache.dtype == np.uint16), k, v, k_cache, v_cache, first_position)


@functools.cache
def _make_chunk(half):
    """k, v, k_cache, v_cache, KV, hd, capacity."""
    store_row = _make_store_row(half)
    dtype = np.uint16 if half else np.float32

    def store_kv(row, position, chunk):
        w, _ = operands(row)
        shape, cache = (w[4], w[5]), (w[6], w[4], w[5])
        slot = position % w[6]
        for source, target in ((w[0], w[2]), (w[1], w[3])):
            store_row(floats(source, shape), numba.carray(pointer(target), cache, dtype)[slot])

    return chunk_function(f"store_kv {half}")(store_kv)


def _record(_, k, v, k_cache, v_cache, first_position):
    one_row(k)
    function = _make_chunk(k_cache.dtype == np.uint16)
    yield Operation(function, (k, v, k_cache, v_cache, *k.shape[1:], len(k_cache)), (k, v), (k_cache, v_cache))


@kernel(_launch, "k, v float32 [n, kv_heads, hd] and caches of one type, [n or more, kv_heads, hd]", _record)
def store_kv(k: Array, v: Array, k_cache: Array, v_cache: Array, first_position: int) -> None:
    """Write the keys and values of positions first_position, first_position + 1, ... into slots position % capacity.

    Caches are float32, or uint16 holding float16: values beyond +-65504 are clamped.
    """
    for i in range(len(k)):
        slot = (first_position + i) % len(k_cache)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            half = cache.dtype == np.uint16
            cache[slot] = np.clip(rows[i], -65504, 65504).astype(np.float16).view(np.uint16) if half else rows[i]
