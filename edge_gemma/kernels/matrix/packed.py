"""The product of 8-bit activations with packed weights: which compiled code computes it, and what it must compute.

Owns: the choice between a few tokens' code (decode.py) and many tokens' (prefill.py), the definition, the operation.
Does not know: the arithmetic of a tile, how weights were quantised.
"""

import numpy as np

from edge_gemma.folder import layouts
from edge_gemma.kernels import isa
from edge_gemma.kernels.matrix import decode, prefill
from edge_gemma.kernels.matrix.decode import factor_blocks, scale_type
from edge_gemma.kernels.registry import Array, kernel
from edge_gemma.kernels.variants import variant

__all__ = ["matmul"]

PREFILL_FROM = 24
"""Tokens from which unpacking weights first pays (prefill.py)."""

_NO_FACTORS = np.empty((0, 0, 2, 8), np.uint16)


def _minimum_bits(w_scale, factors):
    """Bits of the minimum in a word of w_scale; 0 where w_scale are scales alone."""
    return 0 if factors is None else 4 * w_scale.itemsize


def _choice(a_scale, w_scale, bits, group, factors):
    """What the compiled code depends on: the choices of matmul_blocked, and with a tile's tokens those of matmul."""
    return variant(), bits, group, group != 0 and a_scale.shape[1] != 1, _minimum_bits(w_scale, factors)


def _matmul(memory, q, a_scale, sums, packed, w_scale, bits, group, out, factors=None, step=0.0):
    if bits not in (2, 4, 8) or group not in (0, 16, 32):
        raise ValueError(f"weights of {bits} bits in groups of {group}, expected 2, 4 or 8 bits and 0, 16 or 32")
    choice = _choice(a_scale, w_scale, bits, group, factors)
    if not _fit(choice, q, a_scale, sums, packed, w_scale, out, _NO_FACTORS if factors is None else factors):
        return None
    if not len(q):
        return []
    arguments = q, a_scale, sums, packed, w_scale, factors, out, float(step)
    if len(q) >= PREFILL_FROM and isa.SETS[choice[0]].block(bits, group) is not None:
        return prefill.product(memory, choice, *arguments)
    return [decode.product(choice, *arguments)]


def _fit(choice, q, a_scale, sums, packed, w_scale, out, factors):
    _, bits, group, scale_groups, minimum = choice
    (n, kpad), panels = q.shape, len(packed)
    groups = kpad // group if group else 1
    return (
        panels > 0
        and kpad % 32 == 0
        and (sums.shape, a_scale.shape[1]) == ((n, groups), groups if scale_groups else 1)
        and out.shape == (n, 8 * panels)
        and packed.shape == (panels, kpad * bits // 32, 8, 4)
        and (w_scale.shape, w_scale.dtype) == ((panels, groups, 8), scale_type(group, minimum))
        and w_scale.flags.c_contiguous
        and factors.shape == (panels if minimum else 0, factor_blocks(kpad, minimum), 2, 8)
        and (factors.dtype, factors.flags.c_contiguous) == (np.uint16, True)
    )


@kernel(
    "a packed matrix: q int8 [n, kpad]; a_scale float32 [n, 1 or groups]; sums int32 [n, groups]; packed uint8 "
    "[panels, chunks, 8, 4]; w_scale [panels, groups, 8]; out float32 [n, 8 panels]",
    _matmul,
)
def matmul(
    q: Array,
    a_scale: Array,
    sums: Array,
    packed: Array,
    w_scale: Array,
    bits: int,
    group: int,
    out: Array,
    factors: Array | None = None,
    step: float = 0.0,
) -> None:
    """out[n, r] = sum over groups g of a_scale[n, g] * w_scale[g, r] * (sum over k in g of q[n, k] * w[r, k]).

    q, a_scale and sums come from `quantize_activations`; packed and w_scale are as in folder/layouts.py: w_scale uint16
    (the view of float16) for groups of 32 or 16, float32 when group is 0. Any run of panels is a matrix of its own.
    Integer sums are exact; float32 products are added in ascending order of g, so a result is the same for every n and
    every number of threads. q may be -128 where group is 0, else +-127 at most.

    With factors, uint16 (the view of float16) [panels, blocks of 256 columns, 2, 8], w_scale holds words of scale and
    minimum (layouts.py) and weights are w_scale * field - minimum: the fields as they are stored, unsigned, bytes at
    most 127. Words of 32 bits need none: [panels, 0, 2, 8].

    With step, results are rounded to whole steps, half to even, within -128 and 127 of them: what training fixed.

    Raises ValueError for other bits and groups too.
    """
    _products(q, a_scale, sums, packed, w_scale, bits, group, out, factors)
    if step:
        out[...] = np.clip(np.rint(out / np.float32(step)), -128, 127) * np.float32(step)


def _products(
    q: Array, a_scale: Array, sums: Array, packed: Array, w_scale: Array, bits: int, group: int, out: Array,
    factors: Array | None,
) -> None:  # fmt: skip
    dots, wide_a = integer_dots(q, packed, bits, group), a_scale.astype(np.float64)[:, :, None]
    if factors is not None:
        words = layouts.unpack_words(w_scale, factors.view(np.float16), group, 8 * len(packed))
        scales, minima = layouts.scales_and_minima(*words, group).astype(np.float64).transpose(2, 1, 0)
        dots = dots + layouts.zero_point(bits) * sums[:, :, None].astype(np.int64)
        out[...] = ((dots * scales - minima * sums[:, :, None]) * wide_a).sum(axis=1)
        return
    scales = w_scale.view(np.float16) if w_scale.dtype == np.uint16 else w_scale
    scales = scales.astype(np.float64).transpose(1, 0, 2).reshape(scales.shape[1], -1)
    out[...] = (dots * scales * wide_a).sum(axis=1)


def integer_dots(q: Array, packed: Array, bits: int, group: int) -> Array:
    """int64 [n, groups, rows padded to 8]: the exact sum of q * w over each weight group (one group when group = 0)."""
    n, k = q.shape
    w = layouts.unpack_panels(packed, bits, packed.shape[0] * 8, k).astype(np.int64)
    width = group or k
    a = q.astype(np.int64).reshape(n, -1, width)
    return np.einsum("ngk,rgk->ngr", a, w.reshape(len(w), -1, width))
