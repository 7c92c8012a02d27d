"""Packed weight layouts: where every bit of a 2, 4 or 8-bit matrix lies, and the NumPy code that puts it there.

Owns: the panel layout the kernels read (R8K4), its scales, and the row records of tables that stay on disk.
Does not know: quantisation (which integers and scales are good), files, kernels.

Panels, "R8K4". A matrix of integers w [rows, k] is cut into panels of 8 rows; a panel is a run of 32-byte chunks, and a
chunk holds 8 rows x 4 bytes. A byte holds f = 8 / bits fields, so that a chunk covers 4 f consecutive k:

    packed uint8 [panels, chunks, 8, 4]                 byte [p, c, r, kk], 4 bits (f = 2):
    chunk c of panel p                                   7     4 3     0
          kk=0  kk=1  kk=2  kk=3                        +-------+-------+
    r=0  [    ][    ][    ][    ]                       | j = 1 | j = 0 |     field j is row 8 p + r,
    r=1  [    ][    ][    ][    ]                       +-------+-------+     column 4 f c + 4 j + kk
    ...                                                 2 bits (f = 4):
    r=7  [    ][    ][    ][    ]                       | j=3 | j=2 | j=1 | j=0 |

One dword of int8 activations (4 consecutive k) then meets 8 rows at a time, in AVX2, AVX-512 and NEON alike. Fields of
2 and 4 bits are stored unsigned, w + 2^(bits-1); 8-bit fields are two's complement. Rows are padded to a multiple of 8
and k to a multiple of 32 with w = 0, so a panel is a whole number of 64-byte cache lines; a run of panels is a matrix
itself.

Scales. group = 32 or 16 columns share a scale: float16 [panels, groups, 8]. group = 0, one scale a row: float32
[panels, 1, 8]. Padding rows and padding groups have scale 0. The value of an element is w * scale.

With a minimum, groups of 32 or 16 only: the value is scale * u - minimum, u the field as it is stored (0 to 3, 0 to 15;
bytes 0 to 127). Scale and minimum share a word [panels, groups, 8], the scale in its low half:

    minimum = 16   uint32   float16 | float16                                 as in GGUF's Q4_1
    minimum = 8    uint16   8-bit | 8-bit integers, times two factors         Q4_K, Q5_K
    minimum = 4    uint8    4-bit | 4-bit integers, times two factors         Q2_K

Factors are float16 [panels, blocks, 2, 8], one pair (of scales, of minima: GGUF's d and dmin) for 256 columns of a row;
products are float32, and exact. 4 bits in groups of 32 then take 4.625 bits a weight, 2 bits in groups of 16 2.625.

Row records, for tables that are read one row at a time:

    uint8 [rows, record_bytes]: [ its scales: float16 x groups, or float32 x 1 ][ fields, k ascending, low bits first ]

Records may also have groups of 256, one scale a layer's slice of the per-layer-embedding table, float32 as in the QAT
checkpoints.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_gemma.errors import ModelFolderError

Array = NDArray[Any]

PANEL_ROWS = 8
K_MULTIPLE = 32
BITS = (2, 4, 8)
GROUPS = (0, 16, 32)
RECORD_GROUPS = (*GROUPS, 256)
MINIMA = (0, 4, 8, 16)  # bits of a minimum; 0: none
FACTOR_COLUMNS = 256  # that share a pair of factors


def _check(bits: int, group: int = 0, groups: tuple[int, ...] = GROUPS, minimum: int = 0) -> None:
    if bits not in BITS:
        raise ModelFolderError(f"weights of {bits} bits, expected one of {BITS}")
    if group not in groups:
        raise ModelFolderError(f"scales in groups of {group}, expected one of {groups} (0: one a row)")
    if minimum not in MINIMA or (minimum and group not in (16, 32)):
        raise ModelFolderError(
            f"minima of {minimum} bits in groups of {group}, expected 4, 8 or 16 in groups of 16, 32"
        )


def zero_point(bits: int) -> int:
    """The offset added to w before it is stored: 2 for 2 bits, 8 for 4 bits, 0 for 8 bits (two's complement)."""
    _check(bits)
    return 0 if bits == 8 else 1 << (bits - 1)


def padded_k(k: int) -> int:
    """Columns of a packed matrix of k columns, and of the int8 activations it is multiplied with."""
    return -(-k // K_MULTIPLE) * K_MULTIPLE


def group_count(k: int, group: int) -> int:
    """Scales a row of a panel-packed matrix of k columns: padded_k(k) / group, or 1 when group is 0."""
    return padded_k(k) // group if group else 1


def packed_shape(rows: int, k: int, bits: int, group: int = 0) -> tuple[int, int, int, int]:
    """Shape of the packed uint8 array of a [rows, k] matrix: (panels, chunks, 8, 4)."""
    _check(bits, group)
    if rows < 1 or k < 1:
        raise ModelFolderError(f"a matrix of {rows} x {k}, expected at least one row and one column")
    return -(-rows // PANEL_ROWS), padded_k(k) * bits // K_MULTIPLE, PANEL_ROWS, 4


def scales_shape(rows: int, k: int, bits: int, group: int) -> tuple[int, int, int]:
    """Shape of the scales of a [rows, k] matrix: (panels, groups, 8)."""
    return packed_shape(rows, k, bits, group)[0], group_count(k, group), PANEL_ROWS


def scales_dtype(group: int, minimum: int = 0) -> np.dtype[Any]:
    """float32 for one scale a row (group = 0) and groups of 256, float16 for small groups, words with a minimum."""
    _check(8, group, RECORD_GROUPS, minimum)
    if minimum:
        return np.dtype(f"u{2 * minimum // 8}")
    return np.dtype(np.float16 if group in (16, 32) else np.float32)


def factors_shape(rows: int, k: int, minimum: int) -> tuple[int, int, int, int]:
    """Shape of the factors of a [rows, k] matrix with minima: (panels, blocks, 2, 8); no blocks for float16 words."""
    blocks = -(-padded_k(k) // FACTOR_COLUMNS) if minimum < 16 else 0
    return -(-rows // PANEL_ROWS), blocks, 2, PANEL_ROWS


def _unsigned(w: Array, bits: int) -> Array:
    """The stored fields, uint8, of integers w. Raises ModelFolderError where one does not fit."""
    if w.dtype != np.int8 or w.ndim != 2:
        raise ModelFolderError(f"weights are {w.dtype} with {w.ndim} axes, expected int8 [rows, k]")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if w.size and (int(w.min()) < low or int(w.max()) > high):
        raise ModelFolderError(f"weights from {w.min()} to {w.max()}, expected {low} to {high} for {bits} bits")
    return w.view(np.uint8) + np.uint8(zero_point(bits))


def _signed(u: Array, bits: int) -> Array:
    return (u - np.uint8(zero_point(bits))).view(np.int8)


def pack_panels(w: Array, bits: int) -> Array:
    """int8 [rows, k] -> uint8 [panels, chunks, 8, 4] (diagram above). Raises ModelFolderError for values out of
    range.
    """
    _check(bits)
    given = _unsigned(w, bits)
    rows, k = given.shape
    panels, chunks, _, _ = packed_shape(rows, k, bits)
    fields = 8 // bits
    u = np.full((panels * PANEL_ROWS, padded_k(k)), zero_point(bits), np.uint8)
    u[:rows, :k] = given
    u = u.reshape(panels, PANEL_ROWS, chunks, fields, 4)
    packed = np.zeros((panels, chunks, PANEL_ROWS, 4), np.uint8)
    for j in range(fields):
        packed |= (u[:, :, :, j] << np.uint8(bits * j)).transpose(0, 2, 1, 3)
    return packed


def _fields(packed: Array, bits: int) -> Array:
    """uint8 [..., chunks, 4] -> int8 [..., chunks * 4 f]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    u = (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)
    return _signed(u.reshape(*packed.shape[:-2], -1), bits)


def _check_packed(packed: Array, bits: int, rows: int, k: int) -> None:
    expected = packed_shape(rows, k, bits)
    if packed.dtype != np.uint8 or packed.shape != expected:
        raise ModelFolderError(
            f"packed weights are {packed.dtype} {packed.shape}, expected uint8 {expected} for {rows} x {k}, {bits} bits"
        )


def unpack_panels(packed: Array, bits: int, rows: int, k: int) -> Array:
    """The inverse of pack_panels: int8 [rows, k]."""
    _check_packed(packed, bits, rows, k)
    w = _fields(packed.transpose(0, 2, 1, 3), bits)
    return np.ascontiguousarray(w.reshape(-1, w.shape[-1])[:rows, :k])


def panel_rows(packed: Array, bits: int, row_ids: Array, k: int | None = None) -> Array:
    """Rows `row_ids` [n] of a packed matrix: int8 [n, k] (k defaults to the padded one)."""
    _check(bits)
    ids = np.asarray(row_ids, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= packed.shape[0] * PANEL_ROWS):
        raise ModelFolderError(f"row {ids.min()} or {ids.max()} of a matrix of {packed.shape[0] * PANEL_ROWS} rows")
    return _fields(packed[ids // PANEL_ROWS, :, ids % PANEL_ROWS], bits)[:, :k]


def _in_panels(values: Array, count: int) -> Array:
    """[rows, n, ...] -> [panels, count, ..., 8], zeros beyond what is given."""
    rows, given, *rest = values.shape
    panels = -(-rows // PANEL_ROWS)
    padded = np.zeros((panels * PANEL_ROWS, count, *rest), values.dtype)
    padded[:rows, :given] = values
    return np.ascontiguousarray(np.moveaxis(padded.reshape(panels, PANEL_ROWS, count, *rest), 1, -1))


def _of_panels(packed: Array, rows: int) -> Array:
    """The inverse of _in_panels."""
    values = np.moveaxis(packed, -1, 1)
    return np.ascontiguousarray(values.reshape(-1 if values.size else rows, *values.shape[2:])[:rows])


def pack_scales(scales: Array, group: int, k: int | None = None) -> Array:
    """float [rows, groups] (or [rows] when group = 0) -> [panels, groups, 8]; groups are padded to group_count(k,
    group).
    """
    _check(8, group)
    s = np.asarray(scales, np.float32)
    s = s[:, None] if s.ndim == 1 else s
    if s.ndim != 2 or (not group and s.shape[1] != 1):
        raise ModelFolderError(f"scales of shape {s.shape}, expected [rows, groups], one group when group is 0")
    given = s.shape[1]
    groups = group_count(given * group if k is None else k, group)
    if given > groups:
        raise ModelFolderError(f"{given} scales a row, expected at most {groups}")
    with np.errstate(over="ignore"):
        result = _in_panels(s.astype(scales_dtype(group)), groups)
    if not np.isfinite(result).all():
        raise ModelFolderError(f"a scale of {np.abs(s).max()} does not fit {result.dtype}")
    return result


def unpack_scales(packed: Array, rows: int) -> Array:
    """[panels, groups, 8] -> float32 [rows, groups] (padding groups included)."""
    if packed.ndim != 3 or packed.shape[2] != PANEL_ROWS or not 0 < rows <= packed.shape[0] * PANEL_ROWS:
        raise ModelFolderError(
            f"scales of shape {packed.shape} for {rows} rows, expected [panels, groups, {PANEL_ROWS}]"
        )
    return _of_panels(packed, rows).astype(np.float32)


def pack_words(pairs: Array, group: int, minimum: int) -> Array:
    """Scales and minima [rows, groups, 2], uint8 below 2^minimum or (16 bits) floats -> words [panels, groups, 8]."""
    _check(8, group, minimum=minimum)
    dtype = scales_dtype(group, minimum)
    if pairs.ndim != 3 or pairs.shape[2] != 2:
        raise ModelFolderError(f"scales and minima of shape {pairs.shape}, expected [rows, groups, 2]")
    if minimum == 16:
        with np.errstate(over="ignore"):
            halves = pairs.astype(np.float16)
        if not np.isfinite(halves).all():
            raise ModelFolderError(f"a scale or minimum of {np.abs(pairs).max()} does not fit float16")
        pairs = halves.view(np.uint16)
    elif pairs.dtype != np.uint8 or (pairs.size and int(pairs.max()) >> minimum):
        raise ModelFolderError(
            f"scales and minima up to {pairs.max()} in {pairs.dtype}, expected {minimum} bits in uint8"
        )
    words = pairs[..., 0].astype(dtype) | pairs[..., 1].astype(dtype) << dtype.type(minimum)
    return _in_panels(words, group_count(pairs.shape[1] * group, group))


def pack_factors(factors: Array) -> Array:
    """float [rows, blocks, 2] -> float16 [panels, blocks, 2, 8]."""
    with np.errstate(over="ignore"):
        halves = np.asarray(factors, np.float32).astype(np.float16)
    if halves.ndim != 3 or halves.shape[2] != 2 or not np.isfinite(halves).all():
        raise ModelFolderError(f"factors of shape {halves.shape}, expected [rows, blocks, 2], finite in float16")
    return _in_panels(halves, halves.shape[1])


def unpack_words(words: Array, factors: Array, group: int, rows: int) -> tuple[Array, Array]:
    """Words [panels, groups, 8] and factors [panels, blocks, 2, 8] -> scales and minima (uint8, or float16) [rows,
    groups, 2], and float16 [rows, blocks, 2].
    """
    bits = 4 * words.dtype.itemsize
    found = _of_panels(words, rows)
    pairs = np.stack([found & found.dtype.type((1 << bits) - 1), found >> found.dtype.type(bits)], axis=-1)
    pairs = pairs.astype(np.uint16).view(np.float16) if bits == 16 else pairs.astype(np.uint8)
    return pairs, _of_panels(factors, rows)


def scales_and_minima(pairs: Array, factors: Array, group: int) -> Array:
    """float32 [rows, groups, 2]: integers [rows, groups, 2] times factors [rows, blocks, 2], or floats as they are."""
    values = np.asarray(pairs, np.float32)
    if not np.issubdtype(pairs.dtype, np.integer):
        return values
    return values * np.repeat(np.asarray(factors, np.float32), FACTOR_COLUMNS // group, axis=1)[:, : values.shape[1]]


def dequantize_minimum(w: Array, pairs: Array, factors: Array, bits: int, group: int) -> Array:
    """float32 [rows, k] of int8 w [rows, k] (fields less zero_point), pairs and factors as for scales_and_minima."""
    both = np.repeat(scales_and_minima(pairs, factors, group), group, axis=1)[:, : w.shape[1]]
    return (w.astype(np.float32) + np.float32(zero_point(bits))) * both[..., 0] - both[..., 1]


def dequantize(w: Array, scales: Array, group: int) -> Array:
    """float32 [rows, k] of int8 w [rows, k] and float [rows, groups]."""
    s = np.asarray(scales, np.float32)
    return w * (np.repeat(s, group, axis=1)[:, : w.shape[1]] if group else s.reshape(-1, 1))


def dequantize_rounded(w: Array, *scales: Array, bits: int, group: int) -> Array:
    """float32 [rows, k] of int8 w with scales, or, where groups have minima, with pairs and factors."""
    if len(scales) == 1:
        return dequantize(w, scales[0], group)
    pairs, factors = scales
    return dequantize_minimum(w, pairs, factors, bits, group)


def dequantize_panels(
    packed: Array, scales: Array, bits: int, group: int, row_ids: Array, k: int, factors: Array | None = None
) -> Array:
    """float32 [n, k]: rows `row_ids` of a panel-packed matrix, such as the token rows of a tied head."""
    ids = np.asarray(row_ids, np.int64)
    w, place = panel_rows(packed, bits, ids, k), (ids // PANEL_ROWS, Ellipsis, ids % PANEL_ROWS)
    if factors is None:
        return dequantize(w, scales[place], group)
    # one row a panel: rows lie as panels of one row
    return dequantize_minimum(
        w, *unpack_words(scales[place][..., None], factors[place][..., None], group, len(ids)), bits, group
    )


def _record_layout(k: int, bits: int, group: int) -> tuple[int, int]:
    """(bytes of scales, bytes of fields) of a row record."""
    _check(bits, group, RECORD_GROUPS)
    if k < 1:
        raise ModelFolderError(f"rows of {k} columns, expected at least one")
    return scales_dtype(group).itemsize * (-(-k // group) if group else 1), -(-k * bits // 8)


def record_bytes(k: int, bits: int, group: int) -> int:
    """Bytes of a row record of k columns: its scales, then its fields."""
    return sum(_record_layout(k, bits, group))


def pack_rows(w: Array, scales: Array, bits: int, group: int) -> Array:
    """int8 [rows, k] and float [rows, ceil(k / group) or 1] -> uint8 [rows, record_bytes]."""
    u = _unsigned(w, bits)
    rows, k = u.shape
    head, body = _record_layout(k, bits, group)
    s = np.asarray(scales, np.float32).reshape(rows, -1)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(s, scales_dtype(group))
    if stored.nbytes != rows * head or not np.isfinite(stored).all():
        raise ModelFolderError(
            f"scales of shape {s.shape} up to {np.abs(s).max()}, expected {head // stored.itemsize} a row, finite"
        )
    fields = np.zeros((rows, body, 8 // bits), np.uint8)
    fields.reshape(rows, -1)[:, :k] = u
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed = np.bitwise_or.reduce(fields << shifts, axis=2)
    return np.concatenate([stored.view(np.uint8).reshape(rows, head), packed], axis=1)


def unpack_fields(packed: Array, bits: int, k: int) -> Array:
    """uint8 [rows, ceil(k * bits / 8)], low bits first -> int8 [rows, k]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    u = (packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return _signed(u.reshape(len(packed), -1)[:, :k], bits)


def unpack_rows(records: Array, k: int, bits: int, group: int) -> tuple[Array, Array]:
    """uint8 [rows, record_bytes] -> (int8 [rows, k], float32 scales [rows, ceil(k / group) or 1])."""
    head, body = _record_layout(k, bits, group)
    if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != head + body:
        raise ModelFolderError(f"records are {records.dtype} {records.shape}, expected uint8 [rows, {head + body}]")
    scales = np.ascontiguousarray(records[:, :head]).view(scales_dtype(group)).astype(np.float32)
    return unpack_fields(records[:, head:], bits, k), scales


def dequantize_rows(records: Array, k: int, bits: int, group: int) -> Array:
    """float32 [rows, k] of row records uint8 [rows, record_bytes]."""
    w, scales = unpack_rows(records, k, bits, group)
    return dequantize(w, scales, group)
