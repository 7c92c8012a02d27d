"""Activations as 8-bit integers.

Owns: definition and operation of these kernels. Does not know: their loops (compiled/quantize.py), the weights that the
integers will meet.
"""

import numpy as np

from edge_gemma.folder import layouts
from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import ELEMENTS, Operation, rows_together
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["quantize_activations", "quantize_static"]

SMALLEST = np.float32(2.0**-100)  # below it 127 / amax is no longer a float32

# --- quantize_activations ---------------------------------------------------------------------------------------------

_quantize_activations_chunk = chunk_function("kernels.compiled.quantize", "quantize_activations")


def _quantize_activations(_, x, group, q, scale, sums):
    (n, kpad), groups, scales = q.shape, sums.shape[1], scale.shape[1]
    if kpad != layouts.padded_k(x.shape[1]) or 32 % max(group, 1) or groups != (kpad // group if group else 1):
        return None
    if scales not in (1, groups):
        return None
    together = max(1, ELEMENTS // (kpad // groups)) if scales == groups else groups
    operand = x, q, scale, sums, *x.shape, kpad, groups, scales, together
    return [Operation(_quantize_activations_chunk, operand, (x,), (q, scale, sums), n * -(-groups // together))]


@kernel(
    "x float32 [n, k]; q int8 [n, kpad]; scale float32 [n, groups or 1]; sums int32 [n, groups]",
    _quantize_activations,
)
def quantize_activations(x: Array, group: int, q: Array, scale: Array, sums: Array) -> None:
    """Symmetric int8: q = round_half_even(x * 127 / max|x|), within +-127.

    kpad is k rounded up to 32 (layouts.padded_k), q is zero beyond k; groups is kpad / group, 1 where group is 0. scale
    has one value a token or one a weight group; sums are those of q over each weight group. A block whose largest
    magnitude is below 2^-100 becomes q = 0, scale = 0; one that holds an infinity or NaN becomes q = 0, scale = NaN, so
    that the damage stays visible.
    """
    n, k = x.shape
    padded = np.zeros(q.shape, np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(n, scale.shape[1], -1)
    amax = np.abs(blocks).max(axis=2)
    finite = np.isfinite(amax)
    usable = finite & (amax >= SMALLEST)
    scale[...] = np.where(usable, amax / np.float32(127), np.where(finite, np.float32(0), np.float32(np.nan)))
    inverse = np.float32(127) / np.where(usable, amax, np.float32(1))
    blocks = np.where(usable[:, :, None], blocks, np.float32(0))
    q[...] = np.clip(np.rint(blocks * inverse[:, :, None]), -127, 127).astype(np.int8).reshape(q.shape)
    sums[...] = q.reshape(n, sums.shape[1], -1).sum(axis=2, dtype=np.int32)


# --- quantize_static --------------------------------------------------------------------------------------------------

_quantize_static_chunk = chunk_function("kernels.compiled.quantize", "quantize_static")


def _quantize_static(_, x, step, q, scale, sums):
    if q.shape[1] != layouts.padded_k(x.shape[1]):
        return None
    together = rows_together(x.shape[1])
    operand = x, q, scale, sums, *x.shape, q.shape[1], float(step), together
    return [Operation(_quantize_static_chunk, operand, (x,), (q, scale, sums), -(-len(x) // together))]


@kernel("x float32 [n, k]; q int8 [n, kpad]; scale float32 [n, 1]; sums int32 [n, 1]", _quantize_static)
def quantize_static(x: Array, step: float, q: Array, scale: Array, sums: Array) -> None:
    """int8 in steps that training fixed: q = round_half_even(x / step), within -128 and 127, zero beyond k.

    scale is `step` as float32, sums are those of q. A row that holds a NaN becomes q = 0, scale = NaN. Source:
    `apply_srq` of transformers' integrations/gemma_quant.py.
    """
    damaged = np.isnan(x).any(axis=1, keepdims=True)
    q[...] = 0
    q[:, : x.shape[1]] = np.clip(np.rint(np.where(damaged, np.float32(0), x) / np.float32(step)), -128, 127)
    scale[...] = np.where(damaged, np.nan, step)
    sums[...] = q.sum(axis=1, keepdims=True, dtype=np.int32)
