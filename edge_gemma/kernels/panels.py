"""int8 activations times packed weights: cutting a matrix product into tiles, and tiles among threads.

Owns: the loops over tokens and R8K4 panels (edge_gemma/qformat.py). Does not know: the arithmetic of a tile
(kernels/tile.py) and where weights come from.

Threads take runs of panels. Tiles have `most`, half as many, or one token. The last tile of several tokens is moved
back to end with the last token, so that it overlaps the one before: the same results are written twice, and no shape
is compiled for remainders.

A single token waits for the memory, and a core gets more out of it when it reads from several places at a time (27
against 20 GB/s on a 2-core Xeon): its tile walks through as many panels as the instruction set has `streams`, each a
quarter of the matrix apart, so that every stream is one long run of addresses.
"""

import functools

import numba
import numpy as np

from edge_gemma.kernels import isa
from edge_gemma.kernels.jit import array, kernel
from edge_gemma.kernels.tile import TileSpec, make_tile

TOKEN_BLOCK_BYTES = 1 << 18
"""Activations that are kept in a core's cache while all its panels pass by."""


@functools.cache
def make_one_token(variant, bits, group, scale_groups):
    """The tile of a single token."""
    return make_tile(TileSpec(variant, bits, group, scale_groups, 1, isa.SETS[variant].streams))


def make(variant, bits, group, scale_groups):
    """The matmul kernel of an instruction set, width, group size, and kind of activation scale."""
    chosen = isa.SETS[variant]
    zero = np.int32(chosen.zero_point(bits, group))
    most, pair, streams = chosen.tokens(group != 0), chosen.panels, chosen.streams
    some = max(most // 2, 2)
    middle = some < most
    many_tokens = make_tile(TileSpec(variant, bits, group, scale_groups, most, pair))
    some_tokens = make_tile(TileSpec(variant, bits, group, scale_groups, some, pair))
    one_token = make_one_token(variant, bits, group, scale_groups)

    @numba.njit(error_model="numpy")
    def run(q, a_scale, correction, packed, w_scale, out, n0, n1, first, apart):
        """Tokens [n0, n1) of a tile's panels."""
        token = n0
        while token < n1:
            tokens = most if n1 - token >= most else some if n1 - n0 >= some else 1
            token = min(token, n1 - tokens)
            if tokens == 1:
                one_token(q, a_scale, correction, packed, w_scale, out, token, first, apart)
            elif tokens == most:
                many_tokens(q, a_scale, correction, packed, w_scale, out, token, first, apart)
            elif middle:
                some_tokens(q, a_scale, correction, packed, w_scale, out, token, first, apart)
            token += tokens

    def matmul(q, a_scale, sums, packed, w_scale, out):
        n, kpad = q.shape
        panels = packed.shape[0]
        groups = kpad // group if group else 1
        if kpad % 32 or sums.shape != (n, groups) or a_scale.shape != (n, groups if scale_groups else 1):
            return False
        if packed.shape != (panels, kpad * bits // 32, 8, 4) or w_scale.shape != (panels, groups, 8):
            return False
        if out.shape != (n, 8 * panels):
            return False
        correction = np.empty_like(sums)
        for i in range(n):
            for g in range(sums.shape[1]):
                correction[i, g] = -zero * sums[i, g]
        together = n >= some
        units = (panels + pair - 1) // pair if together else (panels + streams - 1) // streams
        block = most * max(1, TOKEN_BLOCK_BYTES // (q.shape[1] * most))
        blocks = max(1, n // block)
        for task in numba.prange(blocks * units):
            b, u = task // units, task % units
            n0, n1 = b * block, n if b == blocks - 1 else (b + 1) * block
            first, apart = (u * pair, 1) if together else (u, units)
            run(q, a_scale, correction, packed, w_scale, out, n0, n1, first, apart)

        return True

    matmul.__name__ = f"matmul_{variant}_{bits}_{group}_{'groups' if scale_groups else 'tokens'}"
    signature = array("i1", 2), array("f4", 2), array("i4", 2), array("u1", 4)
    signature += array("u2" if group else "f4", 3), array("f4", 2, True)
    return kernel(*signature, parallel=True, key=matmul.__name__)(matmul)
