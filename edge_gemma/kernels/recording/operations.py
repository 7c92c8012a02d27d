"""Kernels cut into chunks for one token, as C functions over a row of 64-bit words: what a program is made of.

Owns: the layout of each operation's words and what a chunk of it does. Does not know: the order of operations, threads
(kernels/program.py). The arithmetic is that of the other modules here, row by row.

An operation is a row of int64 words: the address of its function, then its chunks and window (WORDS), then its own: the
addresses of arrays, sizes, and float64 in the same bits. A function is called as (address of the row, position, chunk).
"""

import functools

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from edge_gemma.kernels import elementwise
from edge_gemma.kernels.attend.blocks import BLOCK, finish, make_span, make_store_row, merge, scaled_rows
from edge_gemma.kernels.compiler import part
from edge_gemma.kernels.matrix.decode import factor_blocks, make_correction, make_one_token, scale_type
from edge_gemma.kernels.matrix.floats import make_rows

FUNCTION, CHUNKS, WINDOW, WAITS, OWN = range(5)
"""Words of an operation. CHUNKS: how many chunks, or, where WINDOW is not -1, how many for each block of visible keys
(window 0: all keys). WAITS: whether everything before must be finished. OWN: where the operation's own words begin."""
WORDS = 20

ELEMENTS = 4096
"""Elements of a chunk of an elementwise operation."""
CHUNK_BYTES = 1 << 18
"""Weights of a chunk of a large product, which begins without prefetch: a quarter of it costs 8% of a token."""


@intrinsic
def pointer(typing_context, address):
    def emit(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), emit


@numba.njit(error_model="numpy")
def words(op):
    """The own words of an operation as integers and as floats."""
    first = op + 8 * OWN
    count = WORDS - OWN
    return numba.carray(pointer(first), count, np.int64), numba.carray(pointer(first), count, np.float64)


@numba.njit(error_model="numpy")
def floats(address, shape):
    return numba.carray(pointer(address), shape, np.float32)


@part("rms_norm")
def rms_norm(op, position, chunk):
    """x, weight or 0, out, rows, d, eps."""
    w, f = words(op)
    shape = w[3], w[4]
    x, out = floats(w[0], shape), floats(w[2], shape)
    for n in range(w[3]):
        if w[1]:
            elementwise.weighted_rms_norm_row(x[n], floats(w[1], w[4]), f[5], out[n])
        else:
            elementwise.rms_norm_row(x[n], f[5], out[n])


@part("add_rms_norm")
def add_rms_norm(op, position, chunk):
    """h, a, weight, d, eps."""
    w, f = words(op)
    elementwise.add_rms_norm_row(floats(w[0], w[3]), floats(w[1], w[3]), floats(w[2], w[3]), f[4])


@part("rms_norm_rope")
def rms_norm_rope(op, position, chunk):
    """x, weight, cos, sin, out, heads, hd, eps."""
    w, f = words(op)
    shape, half = (w[5], w[6]), w[6] // 2
    x, out, weight = floats(w[0], shape), floats(w[4], shape), floats(w[1], w[6])
    for h in range(w[5]):
        elementwise.norm_rope_row(x[h], weight, floats(w[2], half), floats(w[3], half), f[7], out[h])


@part("gelu_tanh_mul")
def gelu_tanh_mul(op, position, chunk):
    """gate, up, out, d."""
    w, _ = words(op)
    begin, end = chunk * ELEMENTS, min(w[3], (chunk + 1) * ELEMENTS)
    gate, up, out = floats(w[0], w[3]), floats(w[1], w[3]), floats(w[2], w[3])
    elementwise.gelu_row(gate[begin:end], up[begin:end], out[begin:end])


@part("softcap")
def softcap(op, position, chunk):
    """x, d, cap."""
    w, f = words(op)
    x = floats(w[0], w[1])
    elementwise.softcap_row(x[chunk * ELEMENTS : min(w[1], (chunk + 1) * ELEMENTS)], f[2])


@part("scale")
def scale(op, position, chunk):
    """x, d, factor."""
    w, f = words(op)
    elementwise.scale_row(floats(w[0], w[1]), np.float32(f[2]))


@part("add_scaled")
def add_scaled(op, position, chunk):
    """x, y, d, factor, scale."""
    w, f = words(op)
    begin, end = chunk * ELEMENTS, min(w[2], (chunk + 1) * ELEMENTS)
    x, y = floats(w[0], w[2]), floats(w[1], w[2])
    elementwise.add_scaled_row(x[begin:end], y[begin:end], np.float32(f[3]), np.float32(f[4]))


@part("round_to_step")
def round_to_step(op, position, chunk):
    """x, d, step."""
    w, f = words(op)
    x = floats(w[0], w[1])
    elementwise.round_row(x[chunk * ELEMENTS : min(w[1], (chunk + 1) * ELEMENTS)], np.float32(f[2]))


@part("quantize_activations")
def quantize_activations(op, position, chunk):
    """x, q, scale, sums, k, kpad, groups, groups a chunk."""
    w, _ = words(op)
    k, width = w[4], w[5] // w[6]
    g0, g1 = chunk * w[7], min(w[6], (chunk + 1) * w[7])
    q = numba.carray(pointer(w[1]), w[5], np.int8)[g0 * width : g1 * width]
    sums = numba.carray(pointer(w[3]), w[6], np.int32)[g0:g1]
    x = floats(w[0], k)[min(k, g0 * width) : min(k, g1 * width)]
    elementwise.quantize_row(x, q, floats(w[2], w[6])[g0:g1], sums)


@part("quantize_static")
def quantize_static(op, position, chunk):
    """x, q, scale, sums, k, kpad, step."""
    w, f = words(op)
    q, sums = numba.carray(pointer(w[1]), w[5], np.int8), numba.carray(pointer(w[3]), 1, np.int32)
    elementwise.quantize_static_row(floats(w[0], w[4]), np.float32(f[6]), q, floats(w[2], 1), sums)


@functools.cache
def dense(variant, half):
    """x, w, out, rows, k, rows a chunk."""
    dtype = np.uint16 if half else np.float32
    rows = make_rows(variant, half)

    def dense(op, position, chunk):
        w, _ = words(op)
        matrix = numba.carray(pointer(w[1]), (w[3], w[4]), dtype)
        rows(floats(w[0], (1, w[4])), matrix, floats(w[2], (1, w[3])), chunk * w[5], min(w[3], (chunk + 1) * w[5]))

    return part(f"dense {variant} {half}")(dense)


@functools.cache
def matmul(variant, bits, group, scale_groups, minimum):
    """q, a_scale, sums, packed, w_scale, factors, out, kpad, panels, panels apart, units a chunk."""
    one_token = make_one_token(variant, bits, group, scale_groups, minimum)
    correct = make_correction(variant, bits, group, scale_groups, minimum)
    w_scale_type = scale_type(group, minimum)

    def matmul(op, position, chunk):
        w, _ = words(op)
        kpad, panels = w[7], w[8]
        groups = kpad // group if group else 1
        q, a_scale = numba.carray(pointer(w[0]), (1, kpad), np.int8), floats(w[1], (1, groups if scale_groups else 1))
        sums = numba.carray(pointer(w[2]), (1, groups), np.int32)
        packed = numba.carray(pointer(w[3]), (panels, kpad * bits // 32, 8, 4), np.uint8)
        w_scale = numba.carray(pointer(w[4]), (panels, groups, 8), w_scale_type)
        factors = numba.carray(pointer(w[5]), (panels, factor_blocks(kpad, minimum), 2, 8), np.uint16)
        out = floats(w[6], (1, 8 * panels))
        correction = correct(sums, a_scale)
        for unit in range(chunk * w[10], min(w[9], (chunk + 1) * w[10])):
            one_token(q, a_scale, correction, packed, w_scale, factors, out, 0, unit, w[9])

    return part(f"matmul {variant} {bits} {group} {scale_groups} {minimum}")(matmul)


@functools.cache
def store_kv(half):
    """k, v, k_cache, v_cache, KV, hd, capacity."""
    store_row = make_store_row(half)
    dtype = np.uint16 if half else np.float32

    def store_kv(op, position, chunk):
        w, _ = words(op)
        row, cache = (w[4], w[5]), (w[6], w[4], w[5])
        slot = position % w[6]
        for source, target in ((w[0], w[2]), (w[1], w[3])):
            store_row(floats(source, row), numba.carray(pointer(target), cache, dtype)[slot])

    return part(f"store_kv {half}")(store_kv)


@functools.cache
def attention(variant, half, many_rows, plain):
    """q, k_cache, v_cache, tops, totals, values, H, KV, hd, capacity, window, scale: a block of keys of one KV head."""
    span, tile = make_span(variant, half, 8 if many_rows else 4, plain)
    dtype = np.uint16 if half else np.float32

    def attention(op, position, chunk):
        w, f = words(op)
        heads, kv_heads, hd, capacity, window = w[6], w[7], w[8], w[9], w[10]
        rows = heads // kv_heads
        padded = (rows + tile - 1) // tile * tile
        kv, index = chunk % kv_heads, chunk // kv_heads
        low = max(0, position - window + 1) if window else 0
        first = low // BLOCK + index
        cache = capacity, kv_heads, hd
        k_cache, v_cache = numba.carray(pointer(w[1]), cache, dtype), numba.carray(pointer(w[2]), cache, dtype)
        mine = scaled_rows(floats(w[0], (heads, hd)), kv * rows, rows, np.float32(f[11]), padded)
        at = chunk * padded
        top, total = floats(w[3] + 4 * at, padded), floats(w[4] + 4 * at, padded)
        values = floats(w[5] + 4 * at * hd, (padded, hd))
        span(mine, k_cache, v_cache, kv, low, position, first, first + 1, top, total, values)

    return part(f"attention {variant} {half} {tile}")(attention), tile


@part("merge_attention")
def merge_attention(op, position, chunk):
    """tops, totals, values, out, H, KV, hd, padded, window: the blocks of KV head `chunk`, in ascending order."""
    w, _ = words(op)
    heads, kv_heads, hd, padded, window = w[4], w[5], w[6], w[7], w[8]
    low = max(0, position - window + 1) if window else 0
    blocks = position // BLOCK + 1 - low // BLOCK
    shape = blocks, kv_heads, padded
    tops, totals, values = floats(w[0], shape), floats(w[1], shape), floats(w[2], (blocks, kv_heads, padded, hd))
    top, total, value = tops[0, chunk], totals[0, chunk], values[0, chunk]
    for block in range(1, blocks):
        merge(top, total, value, tops[block, chunk], totals[block, chunk], values[block, chunk])
    rows = heads // kv_heads
    finish(total, value, floats(w[3], (heads, hd)), chunk * rows, rows)
