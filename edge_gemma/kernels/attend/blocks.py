"""Attention over ring and growing KV caches, float32 or float16: blocks of keys, merging, threads.

Owns: definition and operation of this kernel. Does not know: its loops (compiled/attend/blocks.py), projections, rotary
positions, layers.

Keys are taken in blocks of 128 absolute positions; each block is a softmax of its own (maximum, sum, weighted values),
and the blocks of a query are merged in ascending order. So a query's result depends only on its position, never on the
number of threads or on how a prompt was cut into chunks. A decode step spreads blocks over threads, a prefill chunk
spreads queries.
"""

import numpy as np

from edge_gemma.kernels import isa
from edge_gemma.kernels.attend.store import fit
from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import BLOCK, Operation
from edge_gemma.kernels.registry import Array, kernel
from edge_gemma.kernels.variants import variant

__all__ = ["attention"]

HEAD_MULTIPLE = 64
"""Head sizes that the vector block takes; any other goes through plain loops."""
_CODE = "kernels.compiled.attend.blocks"
_merge_chunk = chunk_function(_CODE, "merge_attention")


def rows_of(variant: str, rows: int) -> int:
    """Query rows of a tile: 8 where registers allow and the group has them, else 4."""
    return 8 if isa.SETS[variant].float_sums >= 16 and isa.SETS[variant].float_lanes >= 8 and rows > 4 else 4


def _choice(q, k_cache):
    """What the compiled code depends on: instruction set, float16 caches, rows of a tile (1: plain loops)."""
    plain = q.shape[2] % HEAD_MULTIPLE != 0
    tile = 1 if plain else rows_of(variant(), q.shape[1] // max(k_cache.shape[1], 1))
    return variant(), k_cache.dtype == np.uint16, tile


def _attention(memory, q, k_cache, v_cache, first_position, window, scale, out):
    (n, heads, hd), capacity, first = q.shape, len(k_cache), int(first_position[0])
    kv_heads = k_cache.shape[1] if k_cache.ndim == 3 else 0
    if not (n and hd and kv_heads) or heads % kv_heads or not fit(k_cache, v_cache, kv_heads, hd):
        return None
    seen_before = min(first, window - 1) if window else first
    if first < -1 or window < 0 or n > capacity - max(seen_before, 0):
        return None
    choice, ring = _choice(q, k_cache), memory.ring(first_position, k_cache, v_cache)
    inputs, shape, last = (q, k_cache, v_cache), (heads, kv_heads, hd), (window, float(scale))
    if n > 1:
        operand = q, ring, out, n, *shape, *last
        function = chunk_function(_CODE, "attention_of_rows", *choice)
        return [Operation(function, operand, inputs, (out,), n * kv_heads, position=first_position)]
    (*_, tile), rows = choice, heads // kv_heads
    padded, blocks = -(-rows // tile) * tile, (window or capacity) // BLOCK + 2
    many = blocks, kv_heads, padded
    scratch = (
        *(memory.of_token(name, first_position, many) for name in ("tops", "totals")),
        memory.of_token("values", first_position, (*many, hd)),
    )
    operand = q, ring, *scratch, *shape, *last
    function = chunk_function(_CODE, "attention", *choice)
    of_blocks = Operation(function, operand, inputs, scratch, kv_heads, window, first_position)
    operand = *scratch, out, *shape, padded, window
    return [
        of_blocks, Operation(_merge_chunk, operand, scratch, (out, *scratch), kv_heads, position=first_position)
    ]  # fmt: skip


@kernel(
    "q, out float32 [n, heads, hd]; caches [capacity, kv_heads, hd] of one type that hold the window of every row; "
    "first_position int64 [1]",
    _attention,
)
def attention(
    q: Array, k_cache: Array, v_cache: Array, first_position: Array, window: int, scale: float, out: Array
) -> None:
    """Causal softmax attention of n queries at positions first_position + i, in float32, the maximum subtracted.

    Caches are float32 or uint16 (float16), key position p in slot p % capacity. Query head j reads KV head j * kv_heads
    // heads. Visible are max(0, position - window + 1) <= p <= position, or all p <= position when window is 0.
    first_position -1: there is no query, `out` stays as it is.
    """
    if first_position[0] < 0:
        return
    n, heads, _ = q.shape
    capacity, kv_heads, _ = k_cache.shape
    k, v = (c.view(np.float16) if c.dtype == np.uint16 else c for c in (k_cache, v_cache))
    for i in range(n):
        position = int(first_position[0]) + i
        first = max(0, position - window + 1) if window else 0
        slots = np.arange(first, position + 1) % capacity
        for j in range(heads):
            kv = j * kv_heads // heads
            scores = k[slots, kv].astype(np.float64) @ q[i, j].astype(np.float64) * scale
            p = np.exp(scores - scores.max())
            out[i, j] = p / p.sum() @ v[slots, kv].astype(np.float64)
