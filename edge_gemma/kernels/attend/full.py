"""Attention where every query sees every key: many queries at once, in float32.

Owns: definition and operation of this kernel. Does not know: its loops (compiled/attend/full.py), projections,
positions, who attends to what.

A thread takes GROUP query rows of a head and lets blocks of keys pass by (Dao et al., FlashAttention, 2022).
Rows are alone in each sum, and keys are taken in ascending order: neither threads nor the number of rows change a
result.
"""

import numpy as np

from edge_gemma.kernels import isa
from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import Operation
from edge_gemma.kernels.registry import Array, kernel
from edge_gemma.kernels.variants import variant

__all__ = ["full_attention"]

GROUP = 48
"""Query rows of a task, at least."""
_CODE = "kernels.compiled.attend.full"
_lay_out_chunk = chunk_function(_CODE, "lay_out")


def sizes(variant):
    """(query rows of a task, columns of a panel W) of an instruction set."""
    rows, registers = isa.SETS[variant].float_tile
    return -(-GROUP // rows) * rows, isa.SETS[variant].float_lanes * registers


def _full_attention(memory, q, k, v, out):
    (n, heads, hd), count = q.shape, len(k)
    if min(n, heads, hd, count) < 1:
        return None
    function, (group, width) = chunk_function(_CODE, "full_attention", variant()), sizes(variant())
    panels, padded = -(-count // width), -(-hd // width) * width
    keys = memory.array("keys of full attention", (heads, panels * hd, width))
    values = memory.array("values of full attention", (heads, count, padded))
    operand = k, v, keys, values, count, heads, hd, panels, width, padded
    laid_out = Operation(_lay_out_chunk, operand, (k, v), (keys, values), heads)
    operand = q, keys, values, out, n, count, heads, hd, panels, padded
    return [laid_out, Operation(function, operand, (q, keys, values), (out,), heads * -(-n // group))]


@kernel("q, out float32 [n, heads, hd]; k, v float32 [keys, heads, hd]", _full_attention)
def full_attention(q: Array, k: Array, v: Array, out: Array) -> None:
    """out = softmax(q k^T) v for each head, in float32, the maximum subtracted. Every query sees every key."""
    for head in range(q.shape[1]):
        scores = q[:, head].astype(np.float64) @ k[:, head].astype(np.float64).T
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head].astype(np.float64)
