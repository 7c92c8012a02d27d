"""The NumPy oracle of every kernel: the same names, arguments and results, slow and plain.

Owns: what each kernel must compute. Knows nothing of numba or instruction sets. Integer results are exact; where floats
are summed the oracle sums in float64, and a kernel may differ from it by float32 rounding.
"""

import numpy as np

from edge_gemma.folder.layouts import scales_and_minima, unpack_panels, unpack_words, zero_point


def quantize_activations(x, group, q, scale, sums):
    """See kernels.quantize_activations; bit-exact."""
    n, k = x.shape
    q[...] = 0
    padded = np.zeros(q.shape, np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(n, scale.shape[1], -1)
    amax = np.abs(blocks).max(axis=2)
    scale[...] = np.where(np.isfinite(amax), amax / np.float32(127), np.float32(np.nan))
    tiny = ~(amax >= np.float32(2.0**-100)) | ~np.isfinite(amax)
    scale[tiny & np.isfinite(amax)] = 0
    inverse = np.float32(127) / np.where(tiny, np.float32(1), amax)
    blocks = np.where(tiny[:, :, None], np.float32(0), blocks)
    q[...] = np.clip(np.rint(blocks * inverse[:, :, None]), -127, 127).astype(np.int8).reshape(q.shape)
    sums[...] = q.reshape(n, sums.shape[1], -1).sum(axis=2, dtype=np.int32)


def quantize_static(x, step, q, scale, sums):
    """See kernels.quantize_static; bit-exact."""
    damaged = np.isnan(x).any(axis=1, keepdims=True)
    q[...] = 0
    q[:, : x.shape[1]] = np.clip(np.rint(np.where(damaged, 0, x) / np.float32(step)), -128, 127)
    scale[...] = np.where(damaged, np.nan, step)
    sums[...] = q.sum(axis=1, keepdims=True, dtype=np.int32)


def round_to_step(x, step):
    """See kernels.round_to_step; bit-exact."""
    x[...] = np.clip(np.rint(x / np.float32(step)), -128, 127) * np.float32(step)


def integer_dots(q, packed, bits, group):
    """int64 [n, groups, rows padded to 8]: the exact sum of q * w over each weight group (one group when group = 0)."""
    n, k = q.shape
    w = unpack_panels(packed, bits, packed.shape[0] * 8, k).astype(np.int64)
    width = group or k
    a = q.astype(np.int64).reshape(n, -1, width)
    return np.einsum("ngk,rgk->ngr", a, w.reshape(len(w), -1, width))


def matmul(q, a_scale, sums, packed, w_scale, bits, group, out, factors=None):
    """See kernels.matmul; float64 in place of the kernel's float32 accumulation."""
    if factors is not None:
        rows = 8 * len(packed)
        pairs = scales_and_minima(*unpack_words(w_scale, factors.view(np.float16), group, rows), group)
        scales, minima = pairs.astype(np.float64).transpose(2, 1, 0)
        dots = integer_dots(q, packed, bits, group) + zero_point(bits) * sums[:, :, None].astype(np.int64)
        out[...] = ((dots * scales - minima * sums[:, :, None]) * a_scale.astype(np.float64)[:, :, None]).sum(axis=1)
        return
    scales = w_scale.view(np.float16) if w_scale.dtype == np.uint16 else w_scale
    scales = scales.astype(np.float64).transpose(1, 0, 2).reshape(scales.shape[1], -1)
    y = (integer_dots(q, packed, bits, group) * scales * a_scale.astype(np.float64)[:, :, None]).sum(axis=1)
    out[...] = y


def matmul_bfloat16(x, w, out):
    """See kernels.matmul_bfloat16; summed in float64."""
    out[...] = x.astype(np.float64) @ (w.astype(np.uint32) << 16).view(np.float32).astype(np.float64).T


def rms_norm(x, weight, eps, out):
    """See kernels.rms_norm."""
    wide = x.astype(np.float64)
    y = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + eps)
    out[...] = y if weight is None else y * weight


def add_rms_norm(h, a, weight, eps):
    """See kernels.add_rms_norm."""
    normed = np.empty(a.shape, np.float64)
    rms_norm(a, weight, eps, normed)
    h += normed.astype(np.float32)


def rms_norm_rope(x, weight, cos, sin, eps, out):
    """See kernels.rms_norm_rope."""
    y = np.empty(x.shape, np.float64)
    rms_norm(x, weight, eps, y)
    half = x.shape[2] // 2
    first, second = y[..., :half].copy(), y[..., half:].copy()
    c, s = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    out[..., :half] = first * c - second * s
    out[..., half:] = second * c + first * s


def gelu_tanh_mul(gate, up, out):
    """See kernels.gelu_tanh_mul."""
    x = gate.astype(np.float64)
    out[...] = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * up


def softcap(x, cap):
    """See kernels.softcap."""
    x[...] = cap * np.tanh(x.astype(np.float64) / cap)


def store_kv(k, v, k_cache, v_cache, first_position):
    """See kernels.store_kv; bit-exact."""
    for i in range(len(k)):
        slot = (first_position + i) % len(k_cache)
        for cache, rows in ((k_cache, k), (v_cache, v)):
            half = cache.dtype == np.uint16
            cache[slot] = np.clip(rows[i], -65504, 65504).astype(np.float16).view(np.uint16) if half else rows[i]


def attention(q, k_cache, v_cache, first_position, window, scale, out):
    """See kernels.attention."""
    n, heads, _ = q.shape
    capacity, kv_heads, _ = k_cache.shape
    k, v = (c.view(np.float16) if c.dtype == np.uint16 else c for c in (k_cache, v_cache))
    for i in range(n):
        position = first_position + i
        first = max(0, position - window + 1) if window else 0
        slots = np.arange(first, position + 1) % capacity
        for j in range(heads):
            kv = j * kv_heads // heads
            scores = k[slots, kv].astype(np.float64) @ q[i, j].astype(np.float64) * scale
            p = np.exp(scores - scores.max())
            out[i, j] = p / p.sum() @ v[slots, kv].astype(np.float64)


def block_maxima(x, out):
    """See kernels.block_maxima; exact."""
    for b in range(len(out)):
        out[b] = x[b * 128 : (b + 1) * 128].max()


def exp_sums(x, top, factor, out):
    """See kernels.exp_sums; in float64."""
    for b in range(len(out)):
        out[b] = np.exp((x[b * 128 : (b + 1) * 128].astype(np.float64) - top) * factor).sum()
