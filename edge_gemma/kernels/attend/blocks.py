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

from edge_gemma.kernels.attend.ir import make_block, rows_of
from edge_gemma.kernels.attend.store import fit
from edge_gemma.kernels.compiler import chunk_function, inner
from edge_gemma.kernels.convert import as_float, fill
from edge_gemma.kernels.gates import exp32
from edge_gemma.kernels.recording.operation import BLOCK, Operation, floats, operands, pointer, position_of
from edge_gemma.kernels.registry import Array, kernel
from edge_gemma.kernels.variants import variant

__all__ = ["attention"]

HEAD_MULTIPLE = 64
"""Head sizes that the vector block takes; any other goes through plain loops."""


@inner(fastmath={"contract", "reassoc", "nsz"})
def _dot(q, k):
    total = np.float32(0)
    for d in range(q.shape[0]):
        total += q[d] * as_float(k[d])
    return total


@inner()
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


@inner(fastmath={"contract"})
def _merge(top, total, values, new_top, new_total, new_values):
    """Fold one block's (maximum, sum, values) into the running ones, head by head."""
    for h in range(top.shape[0]):
        best = max(top[h], new_top[h])
        old, new = exp32(top[h] - best), exp32(new_top[h] - best)
        top[h] = best
        total[h] = total[h] * old + new_total[h] * new
        for d in range(values.shape[1]):
            values[h, d] = values[h, d] * old + new_values[h, d] * new


@inner()
def _scaled_rows(q, first, rows, scale, padded):
    """float32 [padded, hd]: rows of q times the attention scale, then zeros."""
    result = np.zeros((padded, q.shape[1]), np.float32)
    for h in range(rows):
        for d in range(q.shape[1]):
            result[h, d] = q[first + h, d] * scale
    return result


@inner()
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

    @inner()
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


def _choice(q, k_cache):
    """What the compiled code depends on: the arguments of _make_span, many_rows in place of the number."""
    rows = q.shape[1] // max(k_cache.shape[1], 1)
    return variant(), k_cache.dtype == np.uint16, rows > 4, q.shape[2] % HEAD_MULTIPLE != 0


@functools.cache
def _make_rows(variant_name, half, many_rows, plain):
    """q, ring, out, n, H, KV, hd, window, scale: the keys of one KV head for one of several queries."""
    span, tile = _make_span(variant_name, half, 8 if many_rows else 4, plain)
    dtype = np.uint16 if half else np.float32

    def attention(row, chunk):
        w, f = operands(row)
        n, heads, kv_heads, hd, window = w[3], w[4], w[5], w[6], w[7]
        ring = numba.carray(pointer(w[1]), 3, np.int64)
        cache = ring[2], kv_heads, hd
        k_cache, v_cache = numba.carray(pointer(ring[0]), cache, dtype), numba.carray(pointer(ring[1]), cache, dtype)
        rows = heads // kv_heads
        padded = (rows + tile - 1) // tile * tile
        kv, i = chunk % kv_heads, chunk // kv_heads
        if position_of(row) < 0:
            return
        position = position_of(row) + i
        low = max(0, position - window + 1) if window else 0
        mine = _scaled_rows(floats(w[0], (n, heads, hd))[i], kv * rows, rows, np.float32(f[8]), padded)
        top, total, values = np.empty(padded, np.float32), np.empty(padded, np.float32), np.empty_like(mine)
        span(mine, k_cache, v_cache, kv, low, position, low // BLOCK, position // BLOCK + 1, top, total, values)
        _finish(total, values, floats(w[2], (n, heads, hd))[i], kv * rows, rows)

    return chunk_function(f"attention of rows {variant_name} {half} {tile}")(attention)


@functools.cache
def _make_chunk(variant_name, half, many_rows, plain):
    """q, ring, tops, totals, values, H, KV, hd, window, scale: a block of keys of one KV head, for one query."""
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


def _attention(memory, q, k_cache, v_cache, first_position, window, scale, out):
    (n, heads, hd), capacity, first = q.shape, len(k_cache), int(first_position[0])
    kv_heads = k_cache.shape[1] if k_cache.ndim == 3 else 0
    if not (n and hd and kv_heads) or heads % kv_heads or not fit(k_cache, v_cache, kv_heads, hd):
        return None
    seen_before = min(first, window - 1) if window else first
    if first < -1 or window < 0 or n > capacity - max(seen_before, 0):
        return None
    choice, ring = _choice(q, k_cache), memory.ring(first_position, k_cache, v_cache)
    inputs, shape, last = (q, k_cache, v_cache), (heads, kv_heads, hd), (window, float(scale))
    if n > 1:
        operand = q, ring, out, n, *shape, *last
        return [Operation(_make_rows(*choice), operand, inputs, (out,), n * kv_heads, position=first_position)]
    function, tile = _make_chunk(*choice)
    rows = heads // kv_heads
    padded, blocks = -(-rows // tile) * tile, (window or capacity) // BLOCK + 2
    many = blocks, kv_heads, padded
    scratch = (
        *(memory.of_token(name, first_position, many) for name in ("tops", "totals")),
        memory.of_token("values", first_position, (*many, hd)),
    )
    operand = q, ring, *scratch, *shape, *last
    of_blocks = Operation(function, operand, inputs, scratch, kv_heads, window, first_position)
    operand = *scratch, out, *shape, padded, window
    return [
        of_blocks, Operation(_merge_chunk, operand, scratch, (out, *scratch), kv_heads, position=first_position)
    ]  # fmt: skip


@kernel(
    "q, out float32 [n, heads, hd]; caches [capacity, kv_heads, hd] of one type that hold the window of every row; "
    "first_position int64 [1]",
    _attention,
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
