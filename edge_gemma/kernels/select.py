"""What a sampler asks of 262,144 logits: where the largest are, and what exp of all of them sums to.

Owns: one pass over the logits, a number a block: definition and operation. Does not know: its loops
(compiled/select.py), how a token is chosen (sampler.py). One thread: a pass takes less time than waking the others.
"""

import numpy as np

from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import Operation
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["LOGITS_BLOCK", "block_maxima", "exp_sums"]

LOGITS_BLOCK = 128
"""Logits that are taken together."""


def _blocks(x):
    return -(-len(x) // LOGITS_BLOCK)


_block_maxima_chunk = chunk_function("kernels.compiled.select", "block_maxima")


def _block_maxima(_, x, out):
    return (
        [Operation(_block_maxima_chunk, (x, out, len(x), len(out)), (x,), (out,))] if len(out) == _blocks(x) else None
    )


@kernel("x float32 [n]; out float32 [blocks of 128]", _block_maxima)
def block_maxima(x: Array, out: Array) -> None:
    """out[b] = the largest of x[128 b : 128 (b + 1)], NaN where one of these is NaN; the last block may be shorter."""
    for b in range(len(out)):
        out[b] = x[b * LOGITS_BLOCK : (b + 1) * LOGITS_BLOCK].max()


_exp_sums_chunk = chunk_function("kernels.compiled.select", "exp_sums")


def _exp_sums(_, x, top, factor, out):
    operand = x, out, len(x), len(out), float(top), float(factor)
    return [Operation(_exp_sums_chunk, operand, (x,), (out,))] if len(out) == _blocks(x) else None


@kernel("x float32 [n]; out float32 [blocks of 128]", _exp_sums)
def exp_sums(x: Array, top: float, factor: float, out: Array) -> None:
    """out[b] = sum of exp((x - top) factor) over x[128 b : 128 (b + 1)]; the last block may be shorter."""
    for b in range(len(out)):
        block = x[b * LOGITS_BLOCK : (b + 1) * LOGITS_BLOCK].astype(np.float64)
        out[b] = np.exp((block - top) * factor).sum()
