"""The compiled arithmetic of the decoder: plain functions over NumPy arrays.

Owns: checking arguments and choosing the compiled code. Does not know: models, layers, files. Kernels are compiled by
numba at their first call, or loaded from the user's cache (kernels/jit.py); importing this package compiles nothing.
`kernels/reference.py` has the NumPy oracle of every function here, with the same arguments.

All arrays are C-contiguous (anything else is a ValueError); floats are float32. float16 arrays are passed as their
uint16 view. Results do not depend on the number of threads, nor on how many rows are computed in one call.
"""

import functools

import numpy as np

from edge_gemma.kernels import jit
from edge_gemma.kernels.jit import cache_directory, cache_note, set_cache_root, set_threads, threads

__all__ = [
    "add_rms_norm", "attention", "available_variants", "cache_directory", "cache_note", "gelu_tanh_mul", "matmul",
    "quantize_activations", "rms_norm", "rms_norm_rope", "set_cache_root", "set_threads", "set_variant", "softcap",
    "store_kv", "threads", "variant",
]  # fmt: skip


@functools.cache
def available_variants() -> tuple[str, ...]:
    """Instruction sets this CPU can run the matrix kernels with, best first (kernels/isa.py)."""
    from numba.core.registry import cpu_target

    from edge_gemma.kernels.isa import available

    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return available(cpu, {f[1:] for f in features.split(",") if f.startswith("+")})


_chosen: str | None = None


def variant() -> str:
    """The instruction set in use, as `edge-gemma info` shows it."""
    return _chosen or available_variants()[0]


def set_variant(name: str | None) -> None:
    """Use another of `available_variants` (None: the best one). For tests and measurements."""
    global _chosen
    if name not in (None, *available_variants()):
        raise ValueError(f"kernel variant {name!r}, expected one of {', '.join(available_variants())}")
    _chosen = name


def _check(name: str, array: np.ndarray, dtypes: tuple, shape: tuple) -> None:
    """Native code does not check bounds, so everything is checked here: dtype, shape and C order."""
    if array.dtype not in dtypes or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape} with strides {array.strides}, "
            f"expected C-contiguous {' or '.join(str(np.dtype(d)) for d in dtypes)} {shape}"
        )


_F32, _HALF, _I8, _I32, _U8 = np.dtype("f4"), np.dtype("u2"), np.dtype("i1"), np.dtype("i4"), np.dtype("u1")


def _frozen(array: np.ndarray) -> np.ndarray:
    """A read-only view: mapped weights are read-only, and numba compiles again for every mutability."""
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


def quantize_activations(x, group, q, scale, sums) -> None:
    """Symmetric int8: q = round_half_even(x * 127 / max|x|), within +-127.

    x float32 [n, k]; q int8 [n, kpad], kpad = k rounded up to 32 (qformat.padded_k), zero beyond k; scale float32 [n,
    1] (one a token) or [n, kpad / group] (one a weight group); sums int32 [n, kpad / group or 1], the sums of q over
    each weight group. A block whose largest magnitude is below 2^-100 becomes q = 0, scale = 0; one that holds an
    infinity or NaN becomes q = 0, scale = NaN, so that the damage stays visible.
    """
    from edge_gemma.kernels import elementwise

    n, k = x.shape
    kpad = -(-k // 32) * 32
    groups = kpad // group if group else 1
    _check("x", x, (_F32,), (n, k))
    _check("q", q, (_I8,), (n, kpad))
    _check("scale", scale, (_F32,), (n, groups if scale.shape[1:] == (groups,) else 1))
    _check("sums", sums, (_I32,), (n, groups))
    jit.launch(elementwise.quantize_activations, x, q, scale, sums)


@functools.cache
def _matmul(variant_name, bits, group, scale_groups):
    from edge_gemma.kernels.panels import make

    return make(variant_name, bits, group, scale_groups)


def matmul(q, a_scale, sums, packed, w_scale, bits, group, out) -> None:
    """out[n, r] = sum over groups g of a_scale[n, g] * w_scale[g, r] * (sum over k in g of q[n, k] * w[r, k]).

    q int8 [n, kpad], a_scale float32 [n, 1 or groups], sums int32 [n, groups] from `quantize_activations`; packed
    uint8 [panels, chunks, 8, 4] and w_scale [panels, groups, 8] as in edge_gemma/qformat.py, uint16 (the view of
    float16) for groups of 32 or 16, float32 when group is 0; any run of panels is a matrix of its own. out float32 [n,
    rows], rows <= 8 panels. Integer sums are exact; float32 products are added in ascending order of g, so a result is
    the same for every n and every number of threads.
    """
    n, rows = out.shape
    panels, kpad = packed.shape[0], q.shape[1]
    groups = kpad // group if group else 1
    if bits not in (2, 4, 8) or group not in (0, 16, 32) or kpad % 32 or not 8 * panels - 8 < rows <= 8 * panels:
        raise ValueError(
            f"{rows} rows in {panels} panels, {kpad} columns, {bits} bits, group {group} is no packed matrix"
        )
    _check("q", q, (_I8,), (n, kpad))
    _check("a_scale", a_scale, (_F32,), (n, groups if a_scale.shape[1:] == (groups,) else 1))
    _check("sums", sums, (_I32,), (n, groups))
    _check("packed", packed, (_U8,), (panels, kpad * bits // 32, 8, 4))
    _check("w_scale", w_scale, (_HALF if group else _F32,), (panels, groups, 8))
    _check("out", out, (_F32,), (n, rows))
    function = _matmul(variant(), bits, group, group != 0 and a_scale.shape[1] > 1)
    jit.launch(function, q, a_scale, sums, _frozen(packed), _frozen(w_scale), out)


def rms_norm(x, weight, eps, out) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis; x, out float32 [n, d], weight float32 [d] or
    None.
    """
    from edge_gemma.kernels import elementwise

    _check("x", x, (_F32,), x.shape[:2])
    _check("out", out, (_F32,), x.shape)
    if weight is not None:
        _check("weight", weight, (_F32,), x.shape[1:])
        weight = _frozen(weight)
    elementwise.rms_norm(x, weight, float(eps), out)


def add_rms_norm(h, a, weight, eps) -> None:
    """h += rms_norm(a) * weight; h, a float32 [n, d], weight float32 [d]."""
    from edge_gemma.kernels import elementwise

    _check("h", h, (_F32,), h.shape[:2])
    _check("a", a, (_F32,), h.shape)
    _check("weight", weight, (_F32,), h.shape[1:])
    elementwise.add_rms_norm(h, a, _frozen(weight), float(eps))


def rms_norm_rope(x, weight, cos, sin, eps, out) -> None:
    """RMS norm of every head, then rotary positions on pairs (i, i + hd / 2); out may be x.

    x, out float32 [n, heads, hd], weight float32 [hd] or None, cos and sin float32 [n, hd / 2].
    """
    from edge_gemma.kernels import elementwise

    n, heads, hd = x.shape
    _check("x", x, (_F32,), (n, heads, hd))
    _check("out", out, (_F32,), (n, heads, hd))
    _check("cos", cos, (_F32,), (n, hd // 2))
    _check("sin", sin, (_F32,), (n, hd // 2))
    if weight is not None:
        _check("weight", weight, (_F32,), (hd,))
        weight = _frozen(weight)
    elementwise.rms_norm_rope(x, weight, _frozen(cos), _frozen(sin), float(eps), out)


def gelu_tanh_mul(gate, up, out) -> None:
    """out = 0.5 gate (1 + tanh(sqrt(2/pi) (gate + 0.044715 gate^3))) * up; float32 [n, d]; out may be gate or up."""
    from edge_gemma.kernels import elementwise

    _check("gate", gate, (_F32,), gate.shape[:2])
    _check("up", up, (_F32,), gate.shape)
    _check("out", out, (_F32,), gate.shape)
    jit.launch(elementwise.gelu_tanh_mul, gate, up, out)


def softcap(x, cap) -> None:
    """x = cap * tanh(x / cap), in place; float32 of any shape."""
    from edge_gemma.kernels import elementwise

    _check("x", x, (_F32,), x.shape)
    elementwise.softcap(x.reshape(-1), float(cap))


def store_kv(k, v, k_cache, v_cache, first_position) -> None:
    """Write the keys and values of positions first_position, ... into slots position % capacity.

    k, v float32 [n, KV, hd], n <= capacity; caches [capacity, KV, hd] float32, or uint16 holding float16 (values beyond
    +-65504 are clamped).
    """
    n, capacity = len(k), len(k_cache)
    if n > capacity or first_position < 0:
        raise ValueError(f"{n} rows from position {first_position} for a cache of {capacity} rows")
    start = first_position % capacity
    head = min(n, capacity - start)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        _check("cache", cache, (_F32, _HALF), (capacity, *k.shape[1:]))
        _check("rows", rows, (_F32,), k.shape)
        if cache.dtype == _HALF:
            rows = np.clip(rows, -65504, 65504).astype(np.float16).view(np.uint16)
        cache[start : start + head] = rows[:head]
        cache[: n - head] = rows[head:]


@functools.cache
def _attention(variant_name, half, many_rows, plain):
    from edge_gemma.kernels.attend import make

    return make(variant_name, half, 8 if many_rows else 4, plain)


def attention(q, k_cache, v_cache, first_position, window, scale, out) -> None:
    """Causal softmax attention of n queries at positions first_position + i.

    q, out float32 [n, H, hd]; caches [capacity, KV, hd] float32 or uint16 (float16), key position p in slot p %
    capacity. Query head j reads KV head j * KV // H. Visible are max(0, position - window + 1) <= p <= position, or
    all p <= position when window is 0. Softmax in float32 with the maximum subtracted.
    """
    n, heads, hd = q.shape
    capacity, kv_heads, _ = k_cache.shape
    last = first_position + n - 1
    oldest = max(0, first_position - window + 1) if window else 0
    if not n or heads % kv_heads or first_position < 0 or window < 0 or last - oldest >= capacity:
        raise ValueError(
            f"{n} queries of {heads} heads from position {first_position} with window {window} "
            f"do not fit a cache of {capacity} rows and {kv_heads} heads"
        )
    _check("q", q, (_F32,), (n, heads, hd))
    _check("out", out, (_F32,), (n, heads, hd))
    _check("k_cache", k_cache, (_F32, _HALF), (capacity, kv_heads, hd))
    _check("v_cache", v_cache, (k_cache.dtype,), (capacity, kv_heads, hd))
    function = _attention(variant(), k_cache.dtype == _HALF, heads // kv_heads > 4, hd % 64 != 0)
    jit.launch(function, q, k_cache, v_cache, int(first_position), int(window), np.float32(scale), out)
