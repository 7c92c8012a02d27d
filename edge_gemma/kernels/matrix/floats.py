"""Products with matrices that stay in bfloat16 or float32.

Owns: definition and operation. Does not know: packed weights, the compiled code (compiled/matrix/floats.py). A result
does not depend on how many rows of x are computed at once, nor on the number of threads.
"""

import numpy as np

from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import CHUNK_BYTES, Operation
from edge_gemma.kernels.registry import Array, kernel
from edge_gemma.kernels.variants import variant

__all__ = ["matmul_bfloat16", "matmul_float"]

ROWS = 4
"""Rows of w that a tile takes: their sums are folded together."""


def _matmul(_, x, w, out):
    rows = ROWS * max(1, min(CHUNK_BYTES // max(ROWS * w.itemsize * w.shape[1], 1), len(w) // (8 * ROWS)))
    operand = x, w, out, *w.shape, rows, len(x)
    function = chunk_function("kernels.compiled.matrix.floats", "dense", variant(), w.dtype == np.uint16)
    return [Operation(function, operand, (x,), (out,), -(-len(w) // rows))]


@kernel("x float32 [n, k]; w float32 [rows, k]; out float32 [n, rows]", _matmul)
def matmul_float(x: Array, w: Array, out: Array) -> None:
    """out = x w^T, the same for every n and every number of threads."""
    out[...] = x.astype(np.float64) @ w.astype(np.float64).T


@kernel("x float32 [n, k]; w uint16 [rows, k]; out float32 [n, rows]", _matmul)
def matmul_bfloat16(x: Array, w: Array, out: Array) -> None:
    """The same with w in bfloat16: the upper halves of float32."""
    out[...] = x.astype(np.float64) @ (w.astype(np.uint32) << 16).view(np.float32).astype(np.float64).T
