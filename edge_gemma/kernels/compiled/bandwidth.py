"""What numba compiles of measuring how fast memory is read (measure/bandwidth.py).

Owns: the sum over a part of the memory, several places at a time, with prefetch. Does not know: what is timed.
"""

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from edge_gemma.kernels.compiled import isa
from edge_gemma.kernels.compiled.operands import operands, pointer


@intrinsic
def _prefetch(typing_context, array, index):
    def emit(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        isa.prefetch(builder, builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


def sum_of(streams, line):
    """streams: how many places are read at a time; line: words in a cache line."""
    ahead = 16 * line  # 1 kB

    def read(row, chunk):
        """words, sums, n, parts: a part, in so many runs at a time."""
        w, _ = operands(row)
        words = numba.carray(pointer(w[0]), w[2], np.uint64)
        sums = numba.carray(pointer(w[1]), w[3], np.uint64)
        run = w[2] // (w[3] * streams * line) * line
        total = np.uint64(0)
        for at in range(chunk * streams * run, (chunk * streams + 1) * run, line):
            for stream in range(streams):
                first = at + stream * run
                _prefetch(words, first + ahead)  # ignored beyond the end
                for word in range(line):
                    total += words[first + word]
        sums[chunk] = total

    return read
