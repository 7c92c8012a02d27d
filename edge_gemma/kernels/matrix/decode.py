"""int8 activations times packed weights: cutting a matrix product into tiles, and tiles among threads.

Owns: the loops over tokens and R8K4 panels (edge_gemma/folder/layouts.py). Does not know: the arithmetic of a tile
(ir.py) and where weights come from.

Threads take runs of panels. A tile has 1, 2, 4, ... tokens, as many as there are and registers allow: so a few tokens
read the weights once. The last tile is moved back to end with the last token, so that it overlaps the one before: the
same results are written twice, and no shape is compiled for remainders.

A few tokens wait for the memory, and a core gets more out of it when it reads from several places at a time (27
against 20 GB/s on a 2-core Xeon): a tile walks through several panels, each a quarter or half of the matrix apart, so
that every stream is one long run of addresses.
"""

import functools

import numba
import numpy as np

from edge_gemma.folder.layouts import FACTOR_COLUMNS
from edge_gemma.kernels import isa
from edge_gemma.kernels.compiler import array, compiled
from edge_gemma.kernels.matrix.ir import TileSpec, make_tile

TOKEN_BLOCK_BYTES = 1 << 18
"""Activations that are kept in a core's cache while all its panels pass by."""


def scale_type(group, minimum):
    """The dtype of w_scale: float16 bits, words of twice the minimum's bits, or float32."""
    return np.dtype(f"u{2 * minimum // 8 or 2}" if group else "f4")


@numba.njit(error_model="numpy")
def factor_blocks(kpad, minimum):
    """Pairs of factors a row."""
    return (kpad + FACTOR_COLUMNS - 1) // FACTOR_COLUMNS if minimum in (4, 8) else 0


def tile_tokens(variant, group, n):
    """Tokens of a tile where there are n."""
    return min(isa.SETS[variant].tokens(group != 0), 1 << n.bit_length() - 1)


@functools.cache
def make_few_tokens(variant, bits, group, scale_groups, minimum, tokens):
    """(tile of so many tokens, its panels)."""
    panels = isa.SETS[variant].tile_panels(tokens, group != 0)
    return make_tile(TileSpec(variant, bits, group, scale_groups, tokens, panels, minimum)), panels


@functools.cache
def make_correction(variant, bits, group, scale_groups, minimum):
    """correction(sums, a_scale): what a tile adds for the fields' offset (int32), or times the minima (float32)."""
    zero = np.int32(isa.SETS[variant].zero_point(bits, group))

    @numba.njit(error_model="numpy")
    def of_zero_point(sums, a_scale):
        result = np.empty_like(sums)
        for i in range(sums.shape[0]):
            for g in range(sums.shape[1]):
                result[i, g] = -zero * sums[i, g]
        return result

    @numba.njit(error_model="numpy")
    def of_minima(sums, a_scale):
        result = np.empty(sums.shape, np.float32)
        for i in range(sums.shape[0]):
            for g in range(sums.shape[1]):
                result[i, g] = np.float32(-sums[i, g]) * (a_scale[i, g] if scale_groups else np.float32(1))
        return result

    return of_minima if minimum else of_zero_point


@functools.cache
def make(variant, bits, group, scale_groups, minimum, tokens):
    """The matmul kernel of an instruction set, width, group size, kind of activation scale, minimum, and a tile's
    tokens, of which there are at least so many.
    """
    tile, streams = make_few_tokens(variant, bits, group, scale_groups, minimum, tokens)
    correct = make_correction(variant, bits, group, scale_groups, minimum)

    def matmul(q, a_scale, sums, packed, w_scale, factors, out):
        n, kpad = q.shape
        panels = packed.shape[0]
        groups = kpad // group if group else 1
        if n < tokens or kpad % 32 or sums.shape != (n, groups) or a_scale.shape != (n, groups if scale_groups else 1):
            return False
        if packed.shape != (panels, kpad * bits // 32, 8, 4) or w_scale.shape != (panels, groups, 8):
            return False
        if out.shape != (n, 8 * panels):
            return False
        if factors.shape != (panels if minimum else 0, factor_blocks(kpad, minimum), 2, 8):
            return False
        correction = correct(sums, a_scale)
        units = (panels + streams - 1) // streams
        block = tokens * max(1, TOKEN_BLOCK_BYTES // (q.shape[1] * tokens))
        blocks = max(1, n // block)
        for task in numba.prange(blocks * units):
            b, unit = task // units, task % units
            n0, n1 = b * block, n if b == blocks - 1 else (b + 1) * block
            for token in range(n0, n1, tokens):
                first = min(token, n1 - tokens)
                tile(q, a_scale, correction, packed, w_scale, factors, out, first, unit, units)
        return True

    matmul.__name__ = f"matmul_{variant}_{bits}_{group}_{'groups' if scale_groups else 'tokens'}_{minimum}_{tokens}"
    signature = array("i1", 2), array("f4", 2), array("i4", 2), array("u1", 4)
    signature += array(scale_type(group, minimum), 3), array("u2", 4), array("f4", 2, True)
    return compiled(*signature, parallel=True, key=matmul.__name__)(matmul)
