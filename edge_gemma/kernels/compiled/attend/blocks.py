"""What numba compiles of attention over ring and growing KV caches (kernels/attend/blocks.py).

Owns: which keys a query sees and in what order they are taken, merging. Does not know: the arithmetic of a block
(ir.py), when it is called.
"""

import functools

import numba
import numpy as np

from edge_gemma.kernels.compiled.attend.ir import make_block
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import as_float, fill
from edge_gemma.kernels.compiled.gates import exp32
from edge_gemma.kernels.compiled.operands import floats, operands, pointer, position_of
from edge_gemma.kernels.recording.operation import BLOCK


@inner(fastmath={"contract", "reassoc", "nsz"})
def _dot(q, k):
    total = np.float32(0)
    for d in range(q.shape[0]):
        total += q[d] * as_float(k[d])
    return total


@inner()
def _plain_block(q, k_cache, v_cache, kv, slot, count, first, scores, top, total, values):
    """One query row against `count` keys from `slot` on; the arguments are those of ir.make_block with one row."""
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
def _scaled_rows(q, first, rows, scale, tile):
    """float32 [padded, hd]: rows of q times the attention scale, then zeros that fill whole tiles."""
    padded = (rows + tile - 1) // tile * tile
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
def _make_span(variant, half, tile):
    """span of an instruction set, for float32 or (half) float16 caches.

    tile: query rows of a tile; 1: loops without vector IR, for any head size.
    """
    block = _plain_block if tile == 1 else make_block(variant, half, tile)

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

    return span


@functools.cache
def _make_caches(half):
    """caches(address of a ring, KV, hd): keys and values [capacity, KV, hd]."""
    dtype = np.uint16 if half else np.float32

    @inner()
    def caches(address, kv_heads, hd):
        ring = numba.carray(pointer(address), 3, np.int64)
        cache = ring[2], kv_heads, hd
        return numba.carray(pointer(ring[0]), cache, dtype), numba.carray(pointer(ring[1]), cache, dtype)

    return caches


def attention_of_rows(variant, half, tile):
    """q, ring, out, n, H, KV, hd, window, scale: the keys of one KV head for one of several queries."""
    span, caches = _make_span(variant, half, tile), _make_caches(half)

    def attention_of_rows(row, chunk):
        w, f = operands(row)
        n, heads, kv_heads, hd, window = w[3], w[4], w[5], w[6], w[7]
        k_cache, v_cache = caches(w[1], kv_heads, hd)
        rows, kv, i = heads // kv_heads, chunk % kv_heads, chunk // kv_heads
        if position_of(row) < 0:
            return
        position = position_of(row) + i
        low = max(0, position - window + 1) if window else 0
        mine = _scaled_rows(floats(w[0], (n, heads, hd))[i], kv * rows, rows, np.float32(f[8]), tile)
        padded = mine.shape[0]
        top, total, values = np.empty(padded, np.float32), np.empty(padded, np.float32), np.empty_like(mine)
        span(mine, k_cache, v_cache, kv, low, position, low // BLOCK, position // BLOCK + 1, top, total, values)
        _finish(total, values, floats(w[2], (n, heads, hd))[i], kv * rows, rows)

    return attention_of_rows


def attention(variant, half, tile):
    """q, ring, tops, totals, values, H, KV, hd, window, scale: a block of keys of one KV head, for one query."""
    span, caches = _make_span(variant, half, tile), _make_caches(half)

    def attention(row, chunk):
        w, f = operands(row)
        heads, kv_heads, hd, window = w[5], w[6], w[7], w[8]
        k_cache, v_cache = caches(w[1], kv_heads, hd)
        rows, kv, index = heads // kv_heads, chunk % kv_heads, chunk // kv_heads
        position = position_of(row)
        low = max(0, position - window + 1) if window else 0
        first = low // BLOCK + index
        mine = _scaled_rows(floats(w[0], (heads, hd)), kv * rows, rows, np.float32(f[9]), tile)
        padded = mine.shape[0]
        at = chunk * padded
        top, total = floats(w[2] + 4 * at, padded), floats(w[3] + 4 * at, padded)
        values = floats(w[4] + 4 * at * hd, (padded, hd))
        span(mine, k_cache, v_cache, kv, low, position, first, first + 1, top, total, values)

    return attention


def merge_attention(row, chunk):
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
