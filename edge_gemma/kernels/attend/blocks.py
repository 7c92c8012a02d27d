"""Attention over ring and growing KV caches, float32 or float16: blocks of keys, merging, threads.

Owns: which keys a query sees and in what order they are taken. Does not know: the arithmetic of a block
(kernels/attend/ir.py), projections, rotary positions, layers.

Keys are taken in blocks of 128 absolute positions; each block is a softmax of its own (maximum, sum, weighted values),
and the blocks of a query are merged in ascending order. So a query's result depends only on its position, never on the
number of threads or on how a prompt was cut into chunks. A decode step spreads blocks over threads, a prefill chunk
spreads queries.
"""

import functools

import numba
import numpy as np
from numba.core import types

from edge_gemma.kernels.attend.ir import make_block, rows_of
from edge_gemma.kernels.compiler import array, chunk_function, compiled, launch
from edge_gemma.kernels.convert import as_float, fill
from edge_gemma.kernels.gates import exp32
from edge_gemma.kernels.recording.operation import Operation, floats, one_row, operands, pointer, position_of
from edge_gemma.kernels.registry import Array, kernel
from edge_gemma.kernels.variants import variant

__all__ = ["attention"]

BLOCK = 128
"""Keys of a block."""

HEAD_MULTIPLE = 64
"""Head sizes that the vector block takes; any other goes through plain loops."""


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _dot(q, k):
    total = np.float32(0)
    for d in range(q.shape[0]):
        total += q[d] * as_float(k[d])
    return total


@numba.njit(error_model="numpy")
def _plain_block(q, k_cache, v_cache, kv, slot, count, first, scores, top, total, values):
    """One query row against `count` keys from `slot` on; the arguments are those of block.make_block with one row."""
    capacity = k_cache.shape[0]
    best = np.float32(-np.inf)
    for i in range(count):
        scores[i, 0] = _dot(q[first], k_cache[(slot + i) % capacity, kv])
        best = max(best, scores[i, 0])
    fill(values[first], np.float32(0))
    norm = np.float32(0)
    for i in range(count):
        e = exp32(scores[i, 0] - best)
        norm += e
        for d in range(q.shape[1]):
            values[first, d] += e * as_float(v_cache[(slot + i) % capacity, kv, d])
    top[first], total[first] = best, norm


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _merge(top, total, values, new_top, new_total, new_values):
    """Fold one block's (maximum, sum, values) into the running ones, head by head."""
    for h in range(top.shape[0]):
        best = max(top[h], new_top[h])
        old, new = exp32(top[h] - best), exp32(new_top[h] - best)
        top[h] = best
        total[h] = total[h] * old + new_total[h] * new
        for d in range(values.shape[1]):
            values[h, d] = values[h, d] * old + new_values[h, d] * new


@numba.njit(error_model="numpy")
def _scaled_rows(q, first, rows, scale, padded):
    """float32 [padded, hd]: rows of q times the attention scale, then zeros."""
    result = np.zeros((padded, q.shape[1]), np.float32)
    for h in range(rows):
        for d in range(q.shape[1]):
            result[h, d] = q[first + h, d] * scale
    return result


@numba.njit(error_model="numpy")
def _finish(total, values, out, first, rows):
    for h in range(rows):
        inverse = np.float32(1) / total[h]
        for d in range(values.shape[1]):
            out[first + h, d] = values[h, d] * inverse


@functools.cache
def _make_span(variant, half, group_rows, plain):
    """(span, rows of its tile) of an instruction set, for float32 or (half) float16 caches.

    group_rows: query heads of a KV head, which decides the tile; plain: loops without vector IR, for any head size.
    """
    tile = 1 if plain else rows_of(variant, group_rows)
    block = _plain_block if plain else make_block(variant, half, tile)

    @numba.njit(error_model="numpy")
    def span(q, k_cache, v_cache, kv, low, position, b0, b1, top, total, values):
        """Blocks [b0, b1) of the keys low..position for all rows of a KV head, into (top, total, values)."""
        scores = np.empty((BLOCK, tile), np.float32)
        more_top, more_total = np.empty_like(top), np.empty_like(total)
        more_values = np.empty_like(values) if b1 - b0 > 1 else values
        for b in range(b0, b1):
            begin = max(low, b * BLOCK)
            count = min(position + 1, (b + 1) * BLOCK) - begin
            slot = begin % k_cache.shape[0]
            t, s, v = (top, total, values) if b == b0 else (more_top, more_total, more_values)
            for first in range(0, q.shape[0], tile):
                block(q, k_cache, v_cache, kv, slot, count, first, scores, t, s, v)
            if b > b0:
                _merge(top, total, values, t, s, v)

    return span, tile


def _make(variant, half, group_rows, plain):
    """The attention kernel; arguments as in _make_span."""
    span, tile = _make_span(variant, half, group_rows, plain)

    def attention(q, k_cache, v_cache, first, window, scale, out):
        n, heads, hd = q.shape
        kv_heads = k_cache.shape[1]
        if first.shape[0] != 1:
            return False
        first_position = first[0]
        if k_cache.shape != v_cache.shape or k_cache.shape[2] != hd or out.shape != q.shape or heads % max(kv_heads, 1):
            return False
        oldest = max(0, first_position - window + 1) if window else 0
        if (
            min(n, hd, kv_heads) < 1
            or min(first_position + 1, window) < 0
            or n > k_cache.shape[0] - (first_position - oldest)
        ):
            return False
        if first_position < 0:
            return True
        rows = heads // kv_heads
        padded = (rows + tile - 1) // tile * tile
        parts = 1
        if n == 1:
            low = max(0, first_position - window + 1) if window else 0
            parts = first_position // BLOCK + 1 - low // BLOCK
        shared = parts if parts > 1 else 0
        tops = np.empty((shared, kv_heads, padded), np.float32)
        totals = np.empty((shared, kv_heads, padded), np.float32)
        everything = np.empty((shared, kv_heads, padded, hd), np.float32)
        for task in numba.prange(n * kv_heads * parts):
            part, kv, i = task % parts, task // parts % kv_heads, task // parts // kv_heads
            position = first_position + i
            low = max(0, position - window + 1) if window else 0
            b0 = low // BLOCK + part
            b1 = position // BLOCK + 1 if parts == 1 else b0 + 1
            mine = _scaled_rows(q[i], kv * rows, rows, scale, padded)
            if parts > 1:
                span(mine, k_cache, v_cache, kv, low, position, b0, b1,
                     tops[part, kv], totals[part, kv], everything[part, kv])  # fmt: skip
            else:
                top, total = np.empty(padded, np.float32), np.empty(padded, np.float32)
                values = np.empty((padded, hd), np.float32)
                span(mine, k_cache, v_cache, kv, low, position, b0, b1, top, total, values)
                _finish(total, values, out[i], kv * rows, rows)
        if parts > 1:
            for kv in range(kv_heads):
                for part in range(1, parts):
                    _merge(tops[0, kv], totals[0, kv], everything[0, kv],
                           tops[part, kv], totals[part, kv], everything[part, kv])  # fmt: skip
                _finish(totals[0, kv], everything[0, kv], out[0], kv * rows, rows)

        return True

    attention.__name__ = f"attention_{'plain' if plain else variant}_{'half' if half else 'float'}_{tile}"
    cache = array("u2" if half else "f4", 3)
    signature = array("f4", 3), cache, cache, array("i8", 1), types.int64, types.float32, array("f4", 3, True)
    return compiled(*signature, parallel=True, key=attention.__name__)(attention)


@functools.cache
def _kernel(variant_name, half, many_rows, plain):
    return _make(variant_name, half, 8 if many_rows else 4, plain)


def _choice(q, k_cache):
    """What the compiled code depends on: the arguments of _make_span, many_rows in place of the number."""
    rows = q.shape[1] // max(k_cache.shape[1], 1)
    return variant(), k_cache.dtype == np.uint16, rows > 4, q.shape[2] % HEAD_MULTIPLE != 0


def _launch(q, k_cache, v_cache, first_position, window, scale, out):
    return launch(_kernel(*_choice(q, k_cache)), q, k_cache, v_cache, first_position, window, scale, out)


@functools.cache
def _make_chunk(variant_name, half, many_rows, plain):
    """q, ring, tops, totals, values, H, KV, hd, window, scale: a block of keys of one KV head."""
    span, tile = _make_span(variant_name, half, 8 if many_rows else 4, plain)
    dtype = np.uint16 if half else np.float32

    def attention(row, chunk):
        w, f = operands(row)
        heads, kv_heads, hd, window = w[5], w[6], w[7], w[8]
        position, ring = position_of(row), numba.carray(pointer(w[1]), 3, np.int64)
        rows = heads // kv_heads
        padded = (rows + tile - 1) // tile * tile
        kv, index = chunk % kv_heads, chunk // kv_heads
        low = max(0, position - window + 1) if window else 0
        first = low // BLOCK + index
        cache = ring[2], kv_heads, hd
        k_cache, v_cache = numba.carray(pointer(ring[0]), cache, dtype), numba.carray(pointer(ring[1]), cache, dtype)
        mine = _scaled_rows(floats(w[0], (heads, hd)), kv * rows, rows, np.float32(f[9]), padded)
        at = chunk * padded
        top, total = floats(w[2] + 4 * at, padded), floats(w[3] + 4 * at, padded)
        values = floats(w[4] + 4 * at * hd, (padded, hd))
        span(mine, k_cache, v_cache, kv, low, position, first, first + 1, top, total, values)

    return chunk_function(f"attention {variant_name} {half} {tile}")(attention), tile


@chunk_function("merge_attention")
def _merge_chunk(row, chunk):
    """tops, totals, values, out, H, KV, hd, padded, window: the blocks of KV head `chunk`, in ascending order."""
    w, _ = operands(row)
    heads, kv_heads, hd, padded, window = w[4], w[5], w[6], w[7], w[8]
    position = position_of(row)
    if position < 0:
        return
    low = max(0, position - window + 1) if window else 0
    blocks = position // BLOCK + 1 - low // BLOCK
    shape = blocks, kv_heads, padded
    tops, totals, values = floats(w[0], shape), floats(w[1], shape), floats(w[2], (blocks, kv_heads, padded, hd))
    top, total, value = tops[0, chunk], totals[0, chunk], values[0, chunk]
    for block in range(1, blocks):
        _merge(top, total, value, tops[block, chunk], totals[block, chunk], values[block, chunk])
    rows = heads // kv_heads
    _finish(total, value, floats(w[3], (heads, hd)), chunk * rows, rows)


def _record(recorder, q, k_cache, v_cache, first_position, window, scale, out):
    one_row(q)
    (_, heads, hd), (capacity, kv_heads, _) = q.shape, k_cache.shape
    rows = heads // kv_heads
    function, tile = _make_chunk(*_choice(q, k_cache))
    padded = -(-rows // tile) * tile
    scratch = recorder.attention_scratch(first_position, (window or capacity) // BLOCK + 2, kv_heads, padded, hd)
    ring = recorder.ring(first_position, k_cache, v_cache)
    operand = q, ring, *scratch, heads, kv_heads, hd, window, float(scale)
    yield Operation(function, operand, (q, k_cache, v_cache), scratch, kv_heads, window, first_position)
    operand = *scratch, out, heads, kv_heads, hd, padded, window
    yield Operation(_merge_chunk, operand, scratch, (out, *scratch), kv_heads, position=first_position)


@kernel(
    _launch,
    "q, out float32 [n, heads, hd]; caches [capacity, kv_heads, hd] of one type that hold the window of every row; "
    "first_position int64 [1]",
    _record,
)
def attention(
    q: Array, k_cache: Array, v_cache: Array, first_position: Array, window: int, scale: float, out: Array
) -> None:
    """Causal softmax attention of n queries at positions first_position + i, in float32, the maximum subtracted.

    Caches are float32 or uint16 (float16), key position p in slot p % capacity. Query head j reads KV head j * kv_heads
    // heads. Visible are max(0, position - window + 1) <= p <= position, or all p <= position when window is 0.
    first_position -1: there is no query, `out` stays as it is.
    """
    if first_position[0] < 0:
        return
    n, heads, _ = q.shape
    capacity, kv_heads, _ = k_cache.shape
    k, v = (c.view(np.float16) if c.dtype == np.uint16 else c for c in (k_cache, v_cache))
    for i in range(n):
        position = int(first_position[0]) + i
        first = max(0, position - window + 1) if window else 0
        slots = np.arange(first, position + 1) % capacity
        for j in range(heads):
            kv = j * kv_heads // heads
            scores = k[slots, kv].astype(np.float64) @ q[i, j].astype(np.float64) * scale
            p = np.exp(scores - scores.max())
            out[i, j] = p / p.sum() @ v[slots, kv].astype(np.float64)
