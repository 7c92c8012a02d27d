"""int8 activations times packed weights for many tokens, where an instruction adds byte products to 32-bit sums.

Owns: the operations of a prompt's product, and the sizes of what passes by at a time. Does not know: how a chunk is
computed (compiled/matrix/prefill.py says, and why), a single token's way (decode.py), instruction sets without such an
instruction.
"""

import numpy as np

from edge_gemma.kernels import isa
from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import Operation

_CODE = "kernels.compiled.matrix.prefill"
BLOCK_BYTES = 24 << 10
"""Unpacked weights that tokens pass by: half of a 48 kB cache."""
TILES = 32
"""Tiles that pass by together: their running sums stay in a core's second cache."""


def product(memory, choice, q, a_scale, sums, packed, w_scale, factors, out, step):
    """The operations: activations side by side, then their product. choice: what `matmul_blocked` is made with."""
    variant, bits, group, scale_groups, minimum = choice
    chosen = isa.SETS[variant]
    (tokens, registers), columns = chosen.block(bits, group), chosen.columns
    (n, kpad), groups, panels = q.shape, sums.shape[1], len(packed)
    tiles = -(-n // tokens)
    activations = memory.array("words", (tiles, kpad // columns, tokens), np.int32)
    correction = memory.array("sums", (tiles, groups, tokens), np.int32)
    scale = memory.array("scales", (tiles, a_scale.shape[1], tokens))
    interleaved = activations, correction, scale
    zero = chosen.zero_point(bits, group)
    operand = q, a_scale, sums, *interleaved, n, kpad, groups, zero
    function = chunk_function(_CODE, "interleave", columns, tokens, scale_groups, minimum != 0)
    side_by_side = Operation(function, operand, (q, a_scale, sums), interleaved, tiles)
    function = chunk_function(_CODE, "matmul_blocked", *choice)
    units = -(-panels // (chosen.panels * registers))
    operand = *interleaved, packed, w_scale, factors, out, n, kpad, panels, units, step
    return [side_by_side, Operation(function, operand, interleaved, (out,), -(-tiles // TILES) * units)]
