"""Single rows of packed matrices as float32: what tokens and per-layer embeddings are made of.

Owns: definition and operation of these kernels. Does not know: their loops (compiled/rows.py), where the bytes come
from.
"""

import numpy as np

from edge_gemma.folder import layouts
from edge_gemma.kernels.functions import chunk_function
from edge_gemma.kernels.recording.operation import Operation, rows_together
from edge_gemma.kernels.registry import Array, kernel

__all__ = ["dequantize_records", "gather_panels"]

_dequantize_records_chunk = chunk_function("kernels.compiled.rows", "dequantize_records")


def _dequantize_records(_, records, bits, group, out):
    n, columns = out.shape
    groups = -(-columns // group) if group else 1
    head = records.shape[1] - (columns * bits + 7) // 8
    if head not in (2 * groups, 4 * groups) or 8 % bits:
        return None
    together = rows_together(columns)
    operand = records, out, *records.shape, columns, bits, group, together
    return [Operation(_dequantize_records_chunk, operand, (records,), (out,), -(-n // together))]


@kernel("records uint8 [n, record_bytes]; out float32 [n, columns]; 2, 4 or 8 bits", _dequantize_records)
def dequantize_records(records: Array, bits: int, group: int, out: Array) -> None:
    """float32 rows out of row records (folder/layouts.py). group: 0 (one scale a row), 16, 32 or 256."""
    out[...] = layouts.dequantize_rows(records, out.shape[1], bits, group)


def _gather_panels(_, packed, w_scale, ids, bits, group, out):
    n, columns = out.shape
    kpad, half = layouts.padded_k(columns), w_scale.dtype == np.uint16
    if packed.shape[1:] != (kpad * bits // 32, 8, 4) or (not half and w_scale.dtype != np.float32):
        return None
    if w_scale.shape != (len(packed), kpad // group if group else 1, 8) or not w_scale.flags.c_contiguous:
        return None
    if not all(0 <= i < 8 * len(packed) for i in ids.tolist()):
        return None
    together = rows_together(columns)
    function = chunk_function("kernels.compiled.rows", "gather_panels", half)
    operand = packed, w_scale, ids, out, n, columns, len(packed), bits, group, together
    return [Operation(function, operand, (packed, w_scale, ids), (out,), -(-n // together))]


@kernel(
    "a packed matrix (see matmul): packed uint8 [panels, chunks, 8, 4]; ids int64 [n], rows it has; out float32 "
    "[n, columns]",
    _gather_panels,
)
def gather_panels(packed: Array, w_scale: Array, ids: Array, bits: int, group: int, out: Array) -> None:
    """float32 rows `ids` of a panel-packed matrix; packed, w_scale as in `matmul`."""
    out[...] = layouts.dequantize_panels(packed, w_scale, bits, group, ids, out.shape[1])
