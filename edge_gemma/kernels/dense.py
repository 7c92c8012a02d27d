"""Products with matrices that stay in bfloat16.

Owns: the dot product and its threads. Does not know: packed weights, instruction sets: a plain loop that LLVM
vectorises. A result does not depend on how many rows of x are computed at once, nor on the number of threads.
"""

import numba
import numpy as np

from edge_gemma.kernels.convert import float_of_bits
from edge_gemma.kernels.jit import array, kernel


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def _dot(x, w):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * float_of_bits(np.int32(w[i]) << np.int32(16))
    return total


@kernel(array("f4", 2), array("u2", 2), array("f4", 2, True), parallel=True)
def matmul_bfloat16(x, w, out):
    if x.shape[1] != w.shape[1] or out.shape != (x.shape[0], w.shape[0]):
        return False
    for r in numba.prange(w.shape[0]):
        for n in range(x.shape[0]):
            out[n, r] = _dot(x[n], w[r])
    return True
