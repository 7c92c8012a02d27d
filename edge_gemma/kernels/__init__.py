"""The compiled arithmetic of the decoder: plain functions over NumPy arrays.

Owns: checking arguments and choosing the compiled code. Does not know: models, layers, files. Kernels are compiled by
numba at their first call, or loaded from the user's cache (compiler.py); importing this package compiles nothing.
`kernels/reference.py` has the NumPy oracle of every function here, with the same arguments.

All arrays are C-contiguous (anything else is a ValueError); floats are float32. float16 arrays are passed as their
uint16 view. Results do not depend on the number of threads, nor on how many rows are computed in one call.
"""

import functools

import numpy as np

from edge_gemma.kernels import compiler
from edge_gemma.kernels.compiler import (
    announce_compiling,
    cache_directory,
    cache_note,
    checked_threads,
    set_cache_root,
    set_threads,
    threads,
    use_threads,
)

__all__ = [
    "add_rms_norm", "add_scaled", "announce_compiling", "attention", "available_variants", "block_maxima",
    "cache_directory", "cache_note", "checked_threads", "dequantize_records", "exp_sums", "gather_panels",
    "gelu_tanh_mul", "matmul", "matmul_bfloat16", "matmul_float", "quantize_activations", "quantize_static", "rms_norm",
    "rms_norm_rope", "round_to_step", "scale", "set_cache_root", "set_threads", "set_variant", "softcap", "store_kv",
    "threads", "use_threads", "variant",
]  # fmt: skip


@functools.cache
def available_variants() -> tuple[str, ...]:
    """Instruction sets this CPU can run the matrix kernels with, best first (kernels/isa.py)."""
    from edge_gemma.kernels.isa import available

    return available(*compiler.host_cpu())


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


def _refuse(what: str, **arrays: np.ndarray) -> None:
    """Compiled kernels check types and shapes before they touch anything; this says what they were given."""
    given = ", ".join(
        f"{name} {a.dtype}{list(a.shape)}{'' if a.flags.c_contiguous else ' not C-contiguous'}"
        for name, a in arrays.items()
    )
    raise ValueError(f"arguments do not fit each other, expected {what}: got {given}")


def _recorded(function):
    """Decorator of a kernel: where this thread is being recorded, its calls are written down (kernels/program.py)."""

    @functools.wraps(function)
    def call(*arguments):
        function(*arguments)
        if (recorder := getattr(compiler.recording, "recorder", None)) is not None:
            recorder.add(function.__name__, arguments)

    return call


@_recorded
def quantize_activations(x, group, q, scale, sums) -> None:
    """Symmetric int8: q = round_half_even(x * 127 / max|x|), within +-127.

    x float32 [n, k]; q int8 [n, kpad], kpad = k rounded up to 32 (qformat.padded_k), zero beyond k; scale float32 [n,
    1] (one a token) or [n, kpad / group] (one a weight group); sums int32 [n, kpad / group or 1], the sums of q over
    each weight group. A block whose largest magnitude is below 2^-100 becomes q = 0, scale = 0; one that holds an
    infinity or NaN becomes q = 0, scale = NaN, so that the damage stays visible.
    """
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.quantize_activations, x, group, q, scale, sums):
        _refuse(f"float32, int8, float32, int32 rows with groups of {group}", x=x, q=q, scale=scale, sums=sums)


@_recorded
def quantize_static(x, step, q, scale, sums) -> None:
    """int8 in steps that training fixed: q = round_half_even(x / step), within -128 and 127.

    x float32 [n, k]; q int8 [n, kpad], zero beyond k; scale float32 [n, 1], all `step` as float32; sums int32 [n, 1].
    A row that holds a NaN becomes q = 0, scale = NaN. Source: `apply_srq` of transformers' integrations/gemma_quant.py.
    """
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.quantize_static, x, step, q, scale, sums):
        _refuse("float32, int8, float32, int32 rows with one scale each", x=x, q=q, scale=scale, sums=sums)


@_recorded
def round_to_step(x, step) -> None:
    """x = round_half_even(x / step) * step, the integer within -128 and 127, in place; float32 [n, d]."""
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.round_to_step, x, step):
        _refuse("float32 [n, d]", x=x)


BLOCKED_FROM = 24
"""Tokens from which unpacking weights first pays (kernels/matrix/prefill.py)."""


@functools.cache
def _matmul(variant_name, bits, group, scale_groups, minimum):
    from edge_gemma.kernels.matrix.decode import make

    if bits not in (2, 4, 8) or group not in (0, 16, 32):
        raise ValueError(f"weights of {bits} bits in groups of {group}, expected 2, 4 or 8 bits and 0, 16 or 32")
    return make(variant_name, bits, group, scale_groups, minimum)


_NO_FACTORS = np.empty((0, 0, 2, 8), np.uint16)


def minimum_bits(w_scale, factors) -> int:
    """Bits of the minimum in a word of w_scale; 0 where w_scale are scales alone."""
    return 0 if factors is None else 4 * w_scale.itemsize


@functools.cache
def _blocked(variant_name, bits, group, scale_groups, minimum):
    """The same for many tokens, as a function of matmul's arrays; None where the instruction set has none."""
    from edge_gemma.kernels.isa import SETS

    if SETS[variant_name].block(group != 0) is None:
        return None
    from edge_gemma.kernels.matrix.prefill import interleaved, make

    def launch(q, a_scale, sums, packed, w_scale, factors, out):
        activations = interleaved(variant_name, bits, group, minimum, q, a_scale, sums)
        if activations is None or len(q) != len(out):
            return False
        function = make(variant_name, bits, group, scale_groups, minimum)
        return compiler.launch(function, *activations, packed, w_scale, factors, out)

    return launch


@_recorded
def matmul(q, a_scale, sums, packed, w_scale, bits, group, out, factors=None) -> None:
    """out[n, r] = sum over groups g of a_scale[n, g] * w_scale[g, r] * (sum over k in g of q[n, k] * w[r, k]).

    q int8 [n, kpad], a_scale float32 [n, 1 or groups], sums int32 [n, groups] from `quantize_activations`; packed
    uint8 [panels, chunks, 8, 4] and w_scale [panels, groups, 8] as in folder/layouts.py, uint16 (the view of
    float16) for groups of 32 or 16, float32 when group is 0; any run of panels is a matrix of its own. out float32 [n,
    8 panels]. Integer sums are exact; float32 products are added in ascending order of g, so a result is
    the same for every n and every number of threads. q may be -128 where group is 0, else +-127 at most.

    With factors, uint16 (the view of float16) [panels, blocks of 256 columns, 2, 8], w_scale holds words of scale and
    minimum (layouts.py) and weights are w_scale * field - minimum: the fields as they are stored, unsigned, bytes at
    most 127. Words of 32 bits need none: [panels, 0, 2, 8].
    """
    choice = variant(), bits, group, group != 0 and a_scale.shape[1] != 1, minimum_bits(w_scale, factors)
    factors = _NO_FACTORS if factors is None else factors
    blocked = _blocked(*choice) if len(q) >= BLOCKED_FROM else None
    launch = blocked or functools.partial(compiler.launch, _matmul(*choice))
    if not launch(q, a_scale, sums, packed, w_scale, factors, out):
        arrays = {"q": q, "a_scale": a_scale, "sums": sums, "packed": packed, "w_scale": w_scale, "out": out}
        _refuse(f"a packed matrix of {bits} bits with groups of {group}", **arrays)


@functools.cache
def _dense(variant_name, half):
    from edge_gemma.kernels.matrix.floats import make

    return make(variant_name, half)


@_recorded
def matmul_bfloat16(x, w, out) -> None:
    """out = x w^T with w in bfloat16, summed in float32: x float32 [n, k], w uint16 [rows, k] (the upper halves of
    float32), out float32 [n, rows]. A result is the same for every n and every number of threads.
    """
    if not compiler.launch(_dense(variant(), True), x, w, out):
        _refuse("float32 [n, k], uint16 [rows, k] and float32 [n, rows]", x=x, w=w, out=out)


@_recorded
def matmul_float(x, w, out) -> None:
    """The same with w in float32."""
    if not compiler.launch(_dense(variant(), False), x, w, out):
        _refuse("float32 [n, k], [rows, k] and [n, rows]", x=x, w=w, out=out)


@_recorded
def rms_norm(x, weight, eps, out) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis; x, out float32 [n, d], weight float32 [d] or
    None.
    """
    from edge_gemma.kernels import elementwise

    if weight is None:
        if not compiler.launch(elementwise.rms_norm_unweighted, x, eps, out):
            _refuse("float32 [n, d]", x=x, out=out)
    elif not compiler.launch(elementwise.rms_norm, x, weight, eps, out):
        _refuse("float32 [n, d] and [d]", x=x, weight=weight, out=out)


@_recorded
def add_rms_norm(h, a, weight, eps) -> None:
    """h += rms_norm(a) * weight; h, a float32 [n, d], weight float32 [d]."""
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.add_rms_norm, h, a, weight, eps):
        _refuse("float32 [n, d] and [d]", h=h, a=a, weight=weight)


@_recorded
def rms_norm_rope(x, weight, cos, sin, eps, out) -> None:
    """RMS norm of every head, then rotary positions on pairs (i, i + hd / 2); out may be x.

    x, out float32 [n, heads, hd], weight float32 [hd], cos and sin float32 [n, hd / 2].
    """
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.rms_norm_rope, x, weight, cos, sin, eps, out):
        _refuse("float32 [n, heads, hd], [hd] and [n, hd / 2]", x=x, weight=weight, cos=cos, sin=sin, out=out)


@_recorded
def gelu_tanh_mul(gate, up, out) -> None:
    """out = 0.5 gate (1 + tanh(sqrt(2/pi) (gate + 0.044715 gate^3))) * up; float32 [n, d]; out may be gate or up."""
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.gelu_tanh_mul, gate, up, out):
        _refuse("float32 [n, d]", gate=gate, up=up, out=out)


@_recorded
def softcap(x, cap) -> None:
    """x = cap * tanh(x / cap), in place; float32 of any shape."""
    from edge_gemma.kernels import elementwise

    if not x.flags.c_contiguous or not compiler.launch(elementwise.softcap, x.reshape(-1), cap):
        _refuse("float32", x=x)


@_recorded
def scale(x, factor) -> None:
    """x *= factor, in place; float32 [n, d]."""
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.scale, x, factor):
        _refuse("float32 [n, d]", x=x)


@_recorded
def add_scaled(x, y, factor, scale) -> None:
    """x = (x + y * factor) * scale, in place; float32 [n, d]."""
    from edge_gemma.kernels import elementwise

    if not compiler.launch(elementwise.add_scaled, x, y, factor, scale):
        _refuse("float32 [n, d]", x=x, y=y)


def dequantize_records(records, bits, group, out) -> None:
    """float32 rows out of row records: uint8 [n, record_bytes] as in folder/layouts.py, out float32 [n, columns].

    bits 2, 4 or 8; group 0 (one scale a row), 16, 32 or 256.
    """
    from edge_gemma.kernels import rows

    if not compiler.launch(rows.dequantize_records, records, bits, group, out):
        _refuse(f"records of {bits} bits in groups of {group}", records=records, out=out)


@functools.cache
def _gather_panels(half):
    from edge_gemma.kernels.rows import make_gather_panels

    return make_gather_panels(half)


def gather_panels(packed, w_scale, ids, bits, group, out) -> None:
    """float32 rows `ids` of a panel-packed matrix: packed, w_scale as in `matmul`, ids int64 [n], out [n, columns]."""
    if not compiler.launch(_gather_panels(w_scale.dtype == np.uint16), packed, w_scale, ids, bits, group, out):
        _refuse(f"a packed matrix of {bits} bits with groups of {group}", packed=packed, w_scale=w_scale, out=out)


LOGITS_BLOCK = 128
"""Logits that `block_maxima` and `exp_sums` take together."""


def block_maxima(x, out) -> None:
    """out[b] = the largest of x[128 b : 128 (b + 1)], NaN where one of these is NaN.

    x float32 [n], out float32 [n / 128, rounded up].
    """
    from edge_gemma.kernels import select

    if not compiler.launch(select.block_maxima, x, out):
        _refuse(f"float32 [n] and blocks of {LOGITS_BLOCK}", x=x, out=out)


def exp_sums(x, top, factor, out) -> None:
    """out[b] = sum of exp((x - top) factor) over x[128 b : 128 (b + 1)]; arrays as in `block_maxima`."""
    from edge_gemma.kernels import select

    if not compiler.launch(select.exp_sums, x, top, factor, out):
        _refuse(f"float32 [n] and blocks of {LOGITS_BLOCK}", x=x, out=out)


@functools.cache
def _store(half):
    from edge_gemma.kernels.attend.blocks import make_store

    return make_store(half)


@_recorded
def store_kv(k, v, k_cache, v_cache, first_position) -> None:
    """Write the keys and values of positions first_position, ... into slots position % capacity.

    k, v float32 [n, KV, hd], n <= capacity; caches [capacity, KV, hd] float32, or uint16 holding float16 (values beyond
    +-65504 are clamped).
    """
    if not compiler.launch(_store(k_cache.dtype == np.uint16), k, v, k_cache, v_cache, first_position):
        what = f"room for {len(k)} rows from position {first_position}"
        _refuse(what, k=k, v=v, k_cache=k_cache, v_cache=v_cache)


@functools.cache
def _attention(variant_name, half, many_rows, plain):
    from edge_gemma.kernels.attend.blocks import make

    return make(variant_name, half, 8 if many_rows else 4, plain)


@_recorded
def attention(q, k_cache, v_cache, first_position, window, scale, out) -> None:
    """Causal softmax attention of n queries at positions first_position + i.

    q, out float32 [n, H, hd]; caches [capacity, KV, hd] float32 or uint16 (float16), key position p in slot p %
    capacity. Query head j reads KV head j * KV // H. Visible are max(0, position - window + 1) <= p <= position, or
    all p <= position when window is 0. Softmax in float32 with the maximum subtracted.
    """
    rows = q.shape[1] // max(1, k_cache.shape[1])
    function = _attention(variant(), k_cache.dtype == np.uint16, rows > 4, q.shape[2] % 64 != 0)
    if not compiler.launch(function, q, k_cache, v_cache, first_position, window, scale, out):
        what = f"every key of positions from {first_position} with window {window} in the cache"
        _refuse(what, q=q, k_cache=k_cache, v_cache=v_cache, out=out)
