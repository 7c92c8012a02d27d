"""int8 activations times packed 2, 4 and 8-bit weights.

Owns: the loops over R8K4 panels (edge_gemma/qformat.py). Does not know: where weights come from.
"""

import numba
import numpy as np

from edge_gemma.kernels.convert import as_float
from edge_gemma.kernels.jit import kernel


@numba.njit(error_model="numpy")
def _group_dot(q, panel, row, bits, first, chunks):
    """Exact sum of q * stored field over `chunks` chunks of one row of a panel."""
    mask = np.uint8((1 << bits) - 1)
    fields = 8 // bits
    total = np.int32(0)
    for c in range(first, first + chunks):
        for kk in range(4):
            byte = panel[c, row, kk]
            for j in range(fields):
                u = (byte >> np.uint8(bits * j)) & mask
                w = np.int32(np.int8(u)) if bits == 8 else np.int32(u)
                total += w * np.int32(q[(c * fields + j) * 4 + kk])
    return total


def make(bits, grouped):
    """The matmul kernel for weights of `bits` bits, with one scale a row or (grouped) float16 scales as uint16."""
    zero = np.int32(0 if bits == 8 else 1 << (bits - 1))

    def matmul(q, a_scale, sums, packed, w_scale, out):
        groups = w_scale.shape[1]
        chunks = packed.shape[1] // groups
        for p in numba.prange(packed.shape[0]):
            for n in range(q.shape[0]):
                for r in range(min(8, out.shape[1] - 8 * p)):
                    total = np.float32(0)
                    for g in range(groups):
                        dot = _group_dot(q[n], packed[p], r, bits, g * chunks, chunks) - zero * sums[n, g]
                        s = as_float(w_scale[p, g, r])
                        s *= a_scale[n, g if a_scale.shape[1] > 1 else 0]
                        total += s * np.float32(dot)
                    out[n, 8 * p + r] = total

    matmul.__qualname__ = matmul.__name__ = f"matmul_{bits}_{'groups' if grouped else 'rows'}"
    return kernel(matmul, parallel=True)
