"""Writing keys and values into ring caches.

Owns: everything about this kernel: compiled code, definition, operation. Does not know: who reads the caches.
"""

import functools

import numba
import numpy as np

from edge_gemma.kernels.compiler import array, chunk_function, compiled, launch
from edge_gemma.kernels.convert import to_half
from edge_gemma.kernels.recording.operation import Operation, floats, one_row, operands, pointer, position_of
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
        if first_position.shape[0] != 1:
            return False
        first = first_position[0]
        if v.shape != k.shape or v_cache.shape != k_cache.shape or k_cache.shape[1:] != (kv_heads, hd):
            return False
        if n > capacity or first < -1:
            return False
        for i in range(n if first >= 0 else 0):
            slot = (first + i) % capacity
            store_row(k[i], k_cache[slot])
            store_row(v[i], v_cache[slot])
        return True

    store_kv.__name__ = f"store_kv_{'half' if half else 'float'}"
    rows, cache = array("f4", 3), array("u2" if half else "f4", 3, True)
    return compiled(rows, rows, cache, cache, array("i8", 1), key=store_kv.__name__)(store_kv)


def _launch(k, v, k_cache, v_cache, first_position):
    return launch(_make_store(k_cache.dtype == np.uint16), k, v, k_cache, v_cache, first_position)


@functools.cache
def _make_chunk(half):
    """k, v, ring, KV, hd."""
    store_row = _make_store_row(half)
    dtype = np.uint16 if half else np.float32

    def store_kv(row, chunk):
        w, _ = operands(row)
        position, ring = position_of(row), numba.carray(pointer(w[2]), 3, np.int64)
        if position < 0:
            return
        shape, cache = (w[3], w[4]), (ring[2], w[3], w[4])
        slot = position % ring[2]
        for source, target in ((w[0], ring[0]), (w[1], ring[1])):
            store_row(floats(source, shape), numba.carray(pointer(target), cache, dtype)[slot])

    return chunk_function(f"store_kv {half}")(store_kv)


def _record(recorder, k, v, k_cache, v_cache, first_position):
    one_row(k)
    operand = k, v, recorder.ring(first_position, k_cache, v_cache), *k.shape[1:]
    function = _make_chunk(k_cache.dtype == np.uint16)
    yield Operation(function, operand, (k, v), (), position=first_position, appends=(k_cache, v_cache))


@kernel(
    _launch,
    "k, v float32 [n, kv_heads, hd]; caches of one type, [n or more, kv_heads, hd]; first_position int64 [1]",
    _record,
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
