"""What numba compiles of a product with packed weights for a few tokens: a chunk's loops over tokens and panels.

Owns: the loops over tokens and R8K4 panels (edge_gemma/folder/layouts.py). Does not know: the arithmetic of a tile
(ir.py), how a product is cut into chunks and why (kernels/matrix/decode.py).
"""

import functools

import numba
import numpy as np

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.matrix.ir import TileSpec, make_tile
from edge_gemma.kernels.compiled.operands import floats, operands, part, pointer
from edge_gemma.kernels.compiled.quantize import round_to_steps
from edge_gemma.kernels.matrix import decode

factor_blocks = inner()(decode.factor_blocks)


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


def matmul(variant, bits, group, scale_groups, minimum, tokens):
    """q, a_scale, sums, packed, w_scale, factors, out, kpad, panels, units, units a chunk, n, tokens a block, step: a
    run of panels for a block of tokens. The last block has what is left, too.
    """
    panels_a_tile = isa.SETS[variant].tile_panels(tokens, group != 0)
    tile = make_tile(TileSpec(variant, bits, group, scale_groups, tokens, panels_a_tile, minimum))
    correct = make_correction(variant, bits, group, scale_groups, minimum)
    w_scale_type = decode.scale_type(group, minimum)

    def matmul(row, chunk):
        w, f = operands(row)
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
        correction, step = correct(sums, a_scale), np.float32(f[13])
        u0, u1 = part(chunk % a_block, w[10], units)
        for unit in range(u0, u1):
            for token in range(0, n1 - n0, tokens):
                tile(q, a_scale, correction, packed, w_scale, factors, out, min(token, n1 - n0 - tokens), unit, units)
            if step:  # a panel or row that another tile writes too is the same in the end
                for i in range(panels_a_tile):
                    panel = 8 * min(unit + i * units, panels - 1)
                    for token in range(n1 - n0):
                        round_to_steps(out[token, panel : panel + 8], step)

    return matmul
