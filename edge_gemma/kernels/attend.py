"""Attention over ring and growing KV caches, float32 or float16.

Owns: scores, softmax and the weighted sum for grouped-query heads. Does not know: projections, rotary positions,
layers.

Keys are taken in blocks of 128 absolute positions; each block is a softmax of its own (maximum, sum, weighted values),
and the blocks of a query are merged in ascending order. So a query's result depends only on its position, never on the
number of threads or on how a prompt was cut into chunks. A decode step spreads blocks over threads, a prefill chunk
spreads queries.
"""

import numba
import numpy as np

from edge_gemma.kernels.convert import as_float
from edge_gemma.kernels.elementwise import exp32
from edge_gemma.kernels.jit import kernel

BLOCK = 128
"""Keys of a block."""


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _dot(q, k):
    total = np.float32(0)
    for d in range(q.shape[0]):
        total += q[d] * as_float(k[d])
    return total


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _add_scaled(out, v, p):
    for d in range(out.shape[0]):
        out[d] += p * as_float(v[d])


@numba.njit(error_model="numpy")
def _block(q, k_cache, v_cache, kv, first, stop, scale, top, total, out, scores):
    """One block of keys [first, stop) for the query heads q [heads, hd]: its maxima, sums and weighted values."""
    capacity = k_cache.shape[0]
    for h in range(q.shape[0]):
        best = np.float32(-np.inf)
        for p in range(first, stop):
            s = _dot(q[h], k_cache[p % capacity, kv]) * scale
            scores[p - first] = s
            best = max(best, s)
        out[h] = 0
        norm = np.float32(0)
        for p in range(first, stop):
            e = exp32(scores[p - first] - best)
            norm += e
            _add_scaled(out[h], v_cache[p % capacity, kv], e)
        top[h] = best
        total[h] = norm


@numba.njit(fastmath={"contract"}, error_model="numpy")
def _merge(top, total, out, new_top, new_total, new_out):
    """Fold one block's (maximum, sum, values) into the running ones, head by head."""
    for h in range(top.shape[0]):
        best = max(top[h], new_top[h])
        old, new = exp32(top[h] - best), exp32(new_top[h] - best)
        top[h] = best
        total[h] = total[h] * old + new_total[h] * new
        for d in range(out.shape[1]):
            out[h, d] = out[h, d] * old + new_out[h, d] * new


@numba.njit(error_model="numpy")
def _finish(total, out):
    for h in range(out.shape[0]):
        inverse = np.float32(1) / total[h]
        for d in range(out.shape[1]):
            out[h, d] *= inverse


def make(half):
    """(decode, prefill) kernels for float32 (half false) or float16 caches."""

    def attention_decode(q, k_cache, v_cache, position, window, scale, out):
        heads, hd = q.shape[1], q.shape[2]
        kv_heads = k_cache.shape[1]
        rows = heads // kv_heads
        low = max(0, position - window + 1) if window else 0
        low_block = low // BLOCK
        blocks = position // BLOCK + 1 - low_block
        top = np.empty((blocks, heads), np.float32)
        total = np.empty((blocks, heads), np.float32)
        values = np.empty((blocks, heads, hd), np.float32)
        for task in numba.prange(blocks * kv_heads):
            b, kv = task // kv_heads, task % kv_heads
            begin = (low_block + b) * BLOCK
            mine = slice(kv * rows, (kv + 1) * rows)
            scores = np.empty(BLOCK, np.float32)
            _block(
                q[0, mine], k_cache, v_cache, kv, max(low, begin), min(position + 1, begin + BLOCK), scale,
                top[b, mine], total[b, mine], values[b, mine], scores,
            )  # fmt: skip
        for b in range(1, blocks):
            _merge(top[0], total[0], values[0], top[b], total[b], values[b])
        _finish(total[0], values[0])
        out[0] = values[0]

    def attention_prefill(q, k_cache, v_cache, first_position, window, scale, out):
        heads, hd = q.shape[1], q.shape[2]
        kv_heads = k_cache.shape[1]
        rows = heads // kv_heads
        for task in numba.prange(q.shape[0] * kv_heads):
            i, kv = task // kv_heads, task % kv_heads
            position = first_position + i
            low = max(0, position - window + 1) if window else 0
            mine = slice(kv * rows, (kv + 1) * rows)
            scores = np.empty(BLOCK, np.float32)
            top, total = np.empty((2, rows), np.float32), np.empty((2, rows), np.float32)
            values = np.empty((rows, hd), np.float32)
            done = out[i, mine]
            for b in range(low // BLOCK, position // BLOCK + 1):
                begin, stop = max(low, b * BLOCK), min(position + 1, (b + 1) * BLOCK)
                if b == low // BLOCK:
                    _block(q[i, mine], k_cache, v_cache, kv, begin, stop, scale, top[0], total[0], done, scores)
                else:
                    _block(q[i, mine], k_cache, v_cache, kv, begin, stop, scale, top[1], total[1], values, scores)
                    _merge(top[0], total[0], done, top[1], total[1], values)
            _finish(total[0], done)

    pair = []
    for function in (attention_decode, attention_prefill):
        function.__name__ = f"{function.__name__}_{'half' if half else 'float'}"
        pair.append(kernel(function, parallel=True))
    return tuple(pair)
