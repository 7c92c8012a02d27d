"""int8 activations times packed weights, a few tokens: the operation, cut into chunks for the threads.

Owns: how a matrix product becomes tiles and chunks, and the facts of a matrix that both halves need. Does not know: the
loops over tiles (compiled/matrix/decode.py), their arithmetic (compiled/matrix/ir.py), where weights come from.

Threads take runs of panels. A tile has 1, 2, 4, ... tokens, as many as there are and registers allow: so a few tokens
read the weights once. The last tile is moved back to end with the last token, so that it overlaps the one before: the
same results are written twice, and no shape is compiled for remainders.

A few tokens wait for the memory, and a core gets more out of it when it reads from several places at a time (27
against 20 GB/s on a 2-core Xeon): a tile walks through several panels, each a quarter or half of the matrix apart, so
that every stream is one long run of addresses.
"""

import numpy as np

from edge_gemma.folder.layouts import FACTOR_COLUMNS
from edge_gemma.kernels import isa
from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import CHUNK_BYTES, Operation
from edge_gemma.kernels.thread_count import threads

TOKEN_BLOCK_BYTES = 1 << 18
"""Activations that are kept in a core's cache while all its panels pass by."""


def scale_type(group, minimum):
    """The dtype of w_scale: float16 bits, words of twice the minimum's bits, or float32."""
    return np.dtype(f"u{2 * minimum // 8 or 2}" if group else "f4")


def factor_blocks(kpad, minimum):
    """Pairs of factors a row."""
    return (kpad + FACTOR_COLUMNS - 1) // FACTOR_COLUMNS if minimum in (4, 8) else 0


def tile_tokens(variant, group, n):
    """Tokens of a tile where there are n."""
    return min(isa.SETS[variant].tokens(group != 0), 1 << n.bit_length() - 1)


def product(choice, q, a_scale, sums, packed, w_scale, factors, out, step):
    """The operation. choice: what `matmul` is made with, but for a tile's tokens."""
    variant, group = choice[0], choice[2]
    (n, kpad), panels = q.shape, len(packed)
    tokens = tile_tokens(variant, group, n)
    units = -(-panels // isa.SETS[variant].tile_panels(tokens, group != 0))
    together = max(1, min(CHUNK_BYTES * units // packed.nbytes, units // (2 * threads())))
    block = max(tokens, min(n, TOKEN_BLOCK_BYTES // kpad)) // tokens * tokens
    operand = q, a_scale, sums, packed, w_scale, factors, out, kpad, panels, units, together, n, block, step
    chunks = n // block * -(-units // together)
    function = chunk_function("kernels.compiled.matrix.decode", "matmul", *choice, tokens)
    return Operation(function, operand, (q, a_scale, sums), (out,), chunks)
