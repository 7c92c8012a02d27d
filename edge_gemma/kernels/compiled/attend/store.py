"""What numba compiles of writing keys and values into ring caches (kernels/attend/store.py).

Owns: the chunk function. Does not know: who reads the caches.
"""

import numba
import numpy as np

from edge_gemma.kernels.compiled.compiler import inner
from edge_gemma.kernels.compiled.convert import to_half
from edge_gemma.kernels.compiled.operands import floats, operands, part, pointer, position_of


def store_kv(half):
    """k, v, ring, n, KV, hd, rows a chunk."""
    dtype = np.uint16 if half else np.float32

    @inner()
    def store_row(rows, slot):
        """rows float32 [KV, hd], slot [KV, hd]."""
        for h in range(rows.shape[0]):
            for d in range(rows.shape[1]):
                slot[h, d] = to_half(rows[h, d]) if half else rows[h, d]

    def store_kv(row, chunk):
        w, _ = operands(row)
        position, ring = position_of(row), numba.carray(pointer(w[2]), 3, np.int64)
        if position < 0:
            return
        shape, cache = (w[3], w[4], w[5]), (ring[2], w[4], w[5])
        for source, target in ((w[0], ring[0]), (w[1], ring[1])):
            rows, slots = floats(source, shape), numba.carray(pointer(target), cache, dtype)
            for i in range(*part(chunk, w[6], w[3])):
                store_row(rows[i], slots[(position + i) % ring[2]])

    return store_kv
