"""What numba compiles of measuring how fast memory is read (measure/bandwidth.py).

Owns: the sum over a part of the memory, several places at a time, with prefetch. Does not know: what is timed.
"""

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.operands import operands, pointer
from edge_gemma.measure.bandwidth import LINE, STREAMS

_AHEAD = 16 * LINE  # 1 kB


@intrinsic
def _prefetch(typing_context, array, index):
    def emit(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        isa.prefetch(builder, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


def sum_of(row, chunk):
    """words, sums, n, parts: a part, in STREAMS runs at a time."""
    w, _ = operands(row)
    words = numba.carray(pointer(w[0]), w[2], np.uint64)
    sums = numba.carray(pointer(w[1]), w[3], np.uint64)
    run = w[2] // (w[3] * STREAMS * LINE) * LINE
    total = np.uint64(0)
    for line in range(chunk * STREAMS * run, (chunk * STREAMS + 1) * run, LINE):
        for stream in range(STREAMS):
            first = line + stream * run
            _prefetch(words, first + _AHEAD)  # ignored beyond the end
            for word in range(LINE):
                total += words[first + word]
    sums[chunk] = total
