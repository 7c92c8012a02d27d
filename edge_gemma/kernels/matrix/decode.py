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
from edge_gemma.kernels.compiler import chunk_function, inner, threads
from edge_gemma.kernels.matrix.ir import TileSpec, make_tile
from edge_gemma.kernels.recording.operation import CHUNK_BYTES, Operation, floats, operands, part, pointer

TOKEN_BLOCK_BYTES = 1 << 18
"""Activations that are kept in a core's cache while all its panels pass by."""


def scale_type(group, minimum):
    """The dtype of w_scale: float16 bits, words of twice the minimum's bits, or float32."""
    return np.dtype(f"u{2 * minimum // 8 or 2}" if group else "f4")


@inner()
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

    @inner()
    def of_zero_point(sums, a_scale):
        result = np.empty_like(sums)
        for i in range(sums.shape[0]):
            for g in range(sums.shape[1]):
                result[i, g] = -zero * sums[i, g]
        return result

    @inner()
    def of_minima(sums, a_scale):
        result = np.empty(sums.shape, np.float32)
        for i in range(sums.shape[0]):
            for g in range(sums.shape[1]):
                result[i, g] = np.float32(-sums[i, g]) * (a_scale[i, g] if scale_groups else np.float32(1))
        return result

    return of_minima if minimum else of_zero_point


@functools.cache
def _make(variant, bits, group, scale_groups, minimum, tokens):
    """q, a_scale, sums, packed, w_scale, factors, out, kpad, panels, units, units a chunk, n, tokens a block: a run of
    panels for a block of tokens. The last block has what is left, too.
    """
    tile, _ = make_few_tokens(variant, bits, group, scale_groups, minimum, tokens)
    correct = make_correction(variant, bits, group, scale_groups, minimum)
    w_scale_type = scale_type(group, minimum)

    def matmul(row, chunk):
        w, _ = operands(row)
        kpad, panels, units, n = w[7], w[8], w[9], w[11]
        groups = kpad // group if group else 1
        a_block = (units + w[10] - 1) // w[10]
        n0, n1 = part(chunk // a_block, w[12], n)
        n1 = n if n - n1 < w[12] else n1
        q = numba.carray(pointer(w[0]), (n, kpad), np.int8)[n0:n1]
        a_scale = floats(w[1], (n, groups if scale_groups else 1))[n0:n1]
        sums = numba.carray(pointer(w[2]), (n, groups), np.int32)[n0:n1]
        packed = numba.carray(pointer(w[3]), (panels, kpad * bits // 32, 8, 4), np.uint8)
        w_scale = numba.carray(pointer(w[4]), (panels, groups, 8), w_scale_type)
        factors = numba.carray(pointer(w[5]), (panels, factor_blocks(kpad, minimum), 2, 8), np.uint16)
        out = floats(w[6], (n, 8 * panels))[n0:n1]
        correction = correct(sums, a_scale)
        u0, u1 = part(chunk % a_block, w[10], units)
        for unit in range(u0, u1):
            for token in range(0, n1 - n0, tokens):
                tile(q, a_scale, correction, packed, w_scale, factors, out, min(token, n1 - n0 - tokens), unit, units)

    return chunk_function(f"matmul {variant} {bits} {group} {scale_groups} {minimum} {tokens}")(matmul)


def product(choice, q, a_scale, sums, packed, w_scale, factors, out):
    """The operation. choice: what make_few_tokens takes, but for the tokens."""
    variant, group = choice[0], choice[2]
    (n, kpad), panels = q.shape, len(packed)
    tokens = tile_tokens(variant, group, n)
    units = -(-panels // make_few_tokens(*choice, tokens)[1])
    together = max(1, min(CHUNK_BYTES * units // packed.nbytes, units // (2 * threads())))
    block = max(tokens, min(n, TOKEN_BLOCK_BYTES // kpad)) // tokens * tokens
    operand = q, a_scale, sums, packed, w_scale, factors, out, kpad, panels, units, together, n, block
    chunks = n // block * -(-units // together)
    return Operation(_make(*choice, tokens), operand, (q, a_scale, sums), (out,), chunks)
