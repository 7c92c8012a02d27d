"""int8 activations times packed weights: cutting a matrix product into tiles, and tiles among threads.

Owns: the loops over tokens and R8K4 panels (edge_gemma/qformat.py). Does not know: the arithmetic of a tile
(kernels/tile.py) and where weights come from.

Threads take runs of panels; a tile's rows beyond the matrix (its last panel may be partial) go to a scratch tile first.
Tiles have `most`, half as many, or one token. The last tile of several tokens is moved back to end with the last token,
so that it overlaps the one before: the same results are written twice, and no shape is compiled for remainders.
"""

import numba
import numpy as np

from edge_gemma.kernels import isa
from edge_gemma.kernels.jit import array, kernel
from edge_gemma.kernels.tile import TileSpec, make_tile

TOKEN_BLOCK_BYTES = 1 << 18
"""Activations that are kept in a core's cache while all its panels pass by."""


def make(variant, bits, group, scale_groups):
    """The matmul kernel of an instruction set, width, group size, and kind of activation scale."""
    chosen = isa.SETS[variant]
    zero = np.int32(chosen.zero_point(bits))
    most, pair = chosen.tokens(group != 0), chosen.panels
    some = max(most // 2, 2)
    middle = some < most
    many_tokens = make_tile(TileSpec(variant, bits, group, scale_groups, most, pair))
    some_tokens = make_tile(TileSpec(variant, bits, group, scale_groups, some, pair))
    one_token = make_tile(TileSpec(variant, bits, group, scale_groups, 1, 1))

    @numba.njit(error_model="numpy")
    def run(q, a_scale, correction, packed, w_scale, out, n0, n1, first, second):
        """Tokens [n0, n1) of one or two panels."""
        rows, n = out.shape[1], n1 - n0
        whole = 8 * second + 8 <= rows
        target = out if whole else np.empty((most, 16), np.float32)
        stride = rows if whole else 16
        at, to = (8 * first, 8 * second) if whole else (0, 8 * (second - first))
        token = n0
        while token < n1:
            tokens = most if n1 - token >= most else some if n >= some else 1
            token = min(token, n1 - tokens)
            o1, o2 = (token * rows + at, token * rows + to) if whole else (at, to)
            if tokens == 1:
                one_token(q, a_scale, correction, packed, w_scale, target, token, first, second, o1, o2, stride)
            elif tokens == most:
                many_tokens(q, a_scale, correction, packed, w_scale, target, token, first, second, o1, o2, stride)
            elif middle:
                some_tokens(q, a_scale, correction, packed, w_scale, target, token, first, second, o1, o2, stride)
            if not whole:
                for t in range(tokens):
                    for r in range(8 * first, rows):
                        out[token + t, r] = target[t, r - 8 * first]
            token += tokens

    def matmul(q, a_scale, sums, packed, w_scale, out):
        n, kpad = q.shape
        panels, rows = packed.shape[0], out.shape[1]
        groups = kpad // group if group else 1
        if kpad % 32 or sums.shape != (n, groups) or a_scale.shape != (n, groups if scale_groups else 1):
            return False
        if packed.shape != (panels, kpad * bits // 32, 8, 4) or w_scale.shape != (panels, groups, 8):
            return False
        if out.shape[0] != n or not 8 * panels - 8 < rows <= 8 * panels:
            return False
        correction = np.empty_like(sums)
        for i in range(n):
            for g in range(sums.shape[1]):
                correction[i, g] = -zero * sums[i, g]
        width = pair if n >= some else 1
        units = (panels + width - 1) // width
        block = most * max(1, TOKEN_BLOCK_BYTES // (q.shape[1] * most))
        blocks = max(1, n // block)
        for task in numba.prange(blocks * units):
            b, u = task // units, task % units
            n0, n1 = b * block, n if b == blocks - 1 else (b + 1) * block
            run(q, a_scale, correction, packed, w_scale, out, n0, n1, u * width, min(u * width + width, panels) - 1)

        return True

    matmul.__name__ = f"matmul_{variant}_{bits}_{group}_{'groups' if scale_groups else 'tokens'}"
    signature = array("i1", 2), array("f4", 2), array("i4", 2), array("u1", 4)
    signature += array("u2" if group else "f4", 3), array("f4", 2, True)
    return kernel(*signature, parallel=True, key=matmul.__name__)(matmul)
