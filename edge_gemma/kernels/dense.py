"""Products with matrices that stay in bfloat16 or float32.

Owns: the dot product and its threads. Does not know: packed weights, instruction sets: a plain loop that LLVM
vectorises. A result does not depend on how many rows of x are computed at once, nor on the number of threads.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import overload

from edge_gemma.kernels.convert import float_of_bits
from edge_gemma.kernels.jit import array, kernel


def _widen(w):
    """float32 of a float32, or of bfloat16 bits (uint16)."""
    raise NotImplementedError("inside kernels only")


@overload(_widen)
def _overload_widen(w):
    if w == types.uint16:
        return lambda w: float_of_bits(np.int32(w) << np.int32(16))
    return lambda w: w


@numba.njit(fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def dot(x, w):
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * _widen(w[i])
    return total


def _make(dtype, name):
    def matmul(x, w, out):
        if x.shape[1] != w.shape[1] or out.shape != (x.shape[0], w.shape[0]):
            return False
        for r in numba.prange(w.shape[0]):
            for n in range(x.shape[0]):
                out[n, r] = dot(x[n], w[r])
        return True

    matmul.__name__ = name
    return kernel(array("f4", 2), array(dtype, 2), array("f4", 2, True), parallel=True, key=name)(matmul)


matmul_bfloat16 = _make("u2", "matmul_bfloat16")
matmul_float = _make("f4", "matmul_float")
